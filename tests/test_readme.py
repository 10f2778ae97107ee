"""What the README tells a reader to type, typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.workspace import Shell, Workspace

README = Path(__file__).parent.parent / "README.md"


def commands() -> list[str]:
    """Every line of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_quantkit_line_works_one_after_another(workspace: Workspace, shell: Shell) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    lines = [line for line in commands() if line.startswith("quantkit ")]
    assert lines[:3] == [
        "quantkit calibrate model/ --data wikitext",
        "quantkit pack --scheme osc",
        "quantkit eval --tasks arc,mmlu",
    ]
    workspace.only("model", "wikitext", "tasks")
    for line in lines:
        done = shell(*shlex.split(line)[1:])
        assert done.code == 0, f"{line}\n{done.err}"
    assert (workspace.path / "model-osc" / "quantkit.json").exists()
    assert (workspace.path / "diagnosis.html").exists()


def test_the_install_lines_name_what_exists() -> None:
    installs = [line for line in commands() if line.startswith("pip ")]
    assert installs == ["pip install -e . && quantkit demo", 'pip install -e ".[test]" && pytest']
    project = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"quantkit\[(\w+)\]", README.read_text(encoding="utf-8")):
        assert re.search(rf"^{extra} = \[", project, re.M), extra


def test_the_demo_runs_on_a_model_of_ones_own(workspace: Workspace, shell: Shell) -> None:
    done = shell("demo", "model", "--samples", "2", "--windows", "2", "--seq-len", "64")
    assert done.code == 0, done.err
    assert re.search(r"^original .*\n^mxfp4 .*\n^osc ", done.out, re.M), done.out
    again = shell("demo", "model", "--samples", "2", "--windows", "2", "--seq-len", "64", "-q")
    assert (again.code, again.out.strip()) == (0, "quantkit-demo")


def test_the_python_lines_work(workspace: Workspace) -> None:
    import torch

    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    model = names["model"]
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape[:2] == (1, 3)  # type: ignore[operator]


def test_exit_codes_are_those_of_the_code() -> None:
    from quantkit import errors

    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), re.M))
    assert set(table) == {"0", "1", "2", "3", "4", "130"}
    assert errors.QuantkitError.exit_code == 1
    assert errors.UsageError.exit_code == 2
    assert errors.InputRejected.exit_code == 3
    assert errors.BelowGate.exit_code == 4
