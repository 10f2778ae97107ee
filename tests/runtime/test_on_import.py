"""`import quantkit` makes the method known to transformers, in either order, and stays instant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.checkpoint.step import Target
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent.parent


def python(code: str, folder: Path) -> str:
    """Run `code` in an interpreter of its own, which finds `folder` before anything installed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_importing_quantkit_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import quantkit, sys; print(*({'torch', 'transformers'} & set(sys.modules)))"
    assert python(code, tmp_path).strip() == ""


@pytest.mark.parametrize(
    "imports",
    [
        "import quantkit\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport quantkit",
        "import quantkit.runtime.huggingface\nfrom transformers import AutoModelForCausalLM",
        "import transformers, quantkit\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["quantkit first", "transformers first", "the adapter first", "transformers begun"],
)
def test_from_pretrained_after_import(calibrated: Path, tmp_path: Path, imports: str) -> None:
    packed = pack(calibrated, PackOptions("osc"), Target(tmp_path / "packed")).output
    code = f"""
{imports}
import torch
model = AutoModelForCausalLM.from_pretrained({str(packed)!r}).eval()
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    assert torch.equal(model(ids).logits, quantkit.load({str(packed)!r})(ids).logits)
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    assert "QuantLinear" in python(code, tmp_path)


def test_a_foreign_transformers_can_still_be_imported(tmp_path: Path) -> None:
    table = tmp_path / "transformers" / "quantizers"
    table.mkdir(parents=True)
    for file in (table.parent / "__init__.py", table / "__init__.py", table / "auto.py"):
        file.write_text("LOADED = True\n")
    code = "import quantkit, transformers.quantizers.auto as table; print(table.LOADED)"
    said = python(code, tmp_path)
    assert "True" in said
    assert "does not work with this transformers" in said


def test_registering_twice_is_harmless() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from quantkit.runtime.huggingface import QuantkitQuantizer, register
    from quantkit.runtime.on_import import register_with_transformers

    finders = list(sys.meta_path)
    for _ in range(2):
        register_with_transformers()
        register()
    assert AUTO_QUANTIZER_MAPPING["quantkit"] is QuantkitQuantizer
    assert sys.meta_path == finders
