"""The whole chain by its commands: what runs online cancels when nothing is rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.cli import main
from quantkit.transforms.equivalence import difference, logits
from tests.tiny import save_tiny
from tests.transforms.families import FAMILIES, tokens

FLOAT64, FLOAT32 = 1e-9, 1e-4  # relative to the largest logit


def quantkit(*arguments: object) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in (*arguments, "-q")])
    assert done.value.code == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_smooth_separate_rotate_pack_without_rounding_is_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = FAMILIES[name]
    source = save_tiny(tmp_path / "model", family, **changes)
    save_file({"ids": tokens(8, 64)}, tmp_path / "tokens.safetensors")
    monkeypatch.chdir(tmp_path)
    data = ("--data", "tokens.safetensors:ids", "--samples", 8)
    quantkit("calibrate", source, *data, "--all-experts")
    quantkit("smooth", "--method", "max", "--no-check", "-o", "smoothed")
    quantkit("calibrate", *data, "--all-experts", "-o", "measured")
    quantkit("separate-outliers", "-o", "planned")
    quantkit("rotate", "--block", 32, "-o", "rotated")
    quantkit("pack", "--scheme", "osc", "--mlp-out", "mxfp4", "--dtype", "float32", "-o", "packed")
    before = logits(source, tokens(), torch.float32)
    assert difference(before, logits(Path("packed"), tokens(), torch.float32)) < FLOAT32
    config = open_checkpoint(Path("packed")).config["quantization_config"]
    assert config["sites"]["mlp_in"]["hadamard"] == {"block": 32}
    assert any(site["branch"] for site in config["sites"].values())


@pytest.mark.parametrize("name", FAMILIES)
def test_smooth_then_rotate_globally_is_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = FAMILIES[name]
    source = save_tiny(tmp_path / "model", family, torch.float64, **changes)
    save_file({"ids": tokens(8, 64)}, tmp_path / "tokens.safetensors")
    monkeypatch.chdir(tmp_path)
    quantkit("calibrate", source, "--data", "tokens.safetensors:ids", "--all-experts")
    quantkit("smooth", "--method", "quantile", "--quantile", 0.99, "--no-check", "-o", "smoothed")
    quantkit("rotate", "--kind", "random-hadamard", "-o", "rotated")
    before = logits(source, tokens())
    for step in ("smoothed", "rotated"):
        assert 0 < difference(before, logits(Path(step), tokens())) < FLOAT64


@pytest.mark.parametrize("name", FAMILIES)
def test_global_rotation_packed_without_rounding_is_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = FAMILIES[name]
    source = save_tiny(tmp_path / "model", family, **changes)
    monkeypatch.chdir(tmp_path)
    quantkit("rotate", source, "--kind", "random-hadamard", "-o", "rotated")
    quantkit("pack", "--scheme", "mxfp4", "--dtype", "float32", "-o", "packed")
    before = logits(source, tokens(), torch.float32)
    assert difference(before, logits(Path("packed"), tokens(), torch.float32)) < FLOAT32
    config = open_checkpoint(Path("packed")).config["quantization_config"]
    width = 32 if family == "qwen3_moe" else 128
    assert config["sites"]["mlp_out"]["hadamard"] == {"size": width}
    assert config["sites"]["attn_in"]["hadamard"] is None


def test_rounding_a_rotated_checkpoint_is_not_the_unrotated_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the tests above: with rounding, the transform must leave a trace.
    source = save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    quantkit("pack", source, "--scheme", "mxfp4", "-o", "plain")
    quantkit("rotate", source, "-o", "rotated")
    quantkit("pack", "rotated", "--scheme", "mxfp4", "-o", "packed")
    exact, plain, packed = (
        logits(path, tokens(), torch.float32) for path in (source, Path("plain"), Path("packed"))
    )
    assert difference(exact, plain) > 0.01
    assert difference(plain, packed) > 0.01
