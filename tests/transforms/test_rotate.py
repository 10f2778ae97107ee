"""Rotations on disk: the same function before and after, in float64, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.manifest import read_manifest
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.transforms.equivalence import difference, logits
from quantkit.transforms.rotate import RotateOptions, rotate_checkpoint
from tests.tiny import save_tiny
from tests.transforms.families import FAMILIES, tokens

FLOAT64, FLOAT32 = 1e-9, 1e-4  # relative to the largest logit


def rotated(source: Path, output: Path, **options: Any) -> Path:
    return rotate_checkpoint(source, RotateOptions(**options), Target(output)).output


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard"])
@pytest.mark.parametrize("name", FAMILIES)
def test_global_rotation_keeps_the_function(name: str, kind: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    source = save_tiny(tmp_path / "model", family, torch.float64, **changes)
    before = logits(source, tokens())
    output = rotated(source, tmp_path / "rotated", kind=kind, parts=("r1", "r2", "r3", "r4"))
    assert difference(before, logits(output, tokens())) < FLOAT64
    narrow = logits(output, tokens(), torch.float32)
    assert difference(logits(source, tokens(), torch.float32), narrow) < FLOAT32
    embedding = "model.embed_tokens.weight"
    moved = open_checkpoint(output).read(embedding) - open_checkpoint(source).read(embedding)
    assert moved.abs().max() > 0.01  # something was rotated


def test_norm_gains_become_one_and_ties_are_untied(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", torch.float64, tie_word_embeddings=True)
    output = rotated(source, tmp_path / "rotated", kind="hadamard")
    checkpoint = open_checkpoint(output)
    for name in checkpoint.names():
        if "norm" in name:
            assert torch.equal(checkpoint.read(name), torch.ones(64, dtype=torch.float64))
    assert "lm_head.weight" in checkpoint.tensors
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    manifest = read_manifest(output)
    assert manifest is not None
    notes = manifest.steps[-1].notes
    assert notes["untied"] is True
    assert notes["online"] == {"mlp_out": {"size": 128}}
    assert notes["r3"] == {"size": 16}


def test_block_changes_no_weight_and_records_what_packing_applies(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3_moe", torch.float32)
    output = rotated(source, tmp_path / "rotated", block=64, sites=("mlp_in", "mlp_out"))
    before, after = open_checkpoint(source), open_checkpoint(output)
    assert before.weights_digest() == after.weights_digest()
    assert (source / "model.safetensors").stat().st_ino == (
        output / "model.safetensors"
    ).stat().st_ino
    manifest = read_manifest(output)
    assert manifest is not None
    # The experts are 32 wide: the largest block that divides them.
    assert manifest.steps[-1].notes["online"] == {
        "mlp_in": {"block": 64},
        "mlp_out": {"block": 32},
    }


def test_defaults_follow_the_scheme(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    result = rotate_checkpoint(source, RotateOptions(), Target(tmp_path / "a"))
    assert set(map(str, result.notes["online"].values())) == {"{'block': 32}"}
    result = rotate_checkpoint(source, RotateOptions(scheme="int4"), Target(tmp_path / "b"))
    assert result.notes["r1"]["size"] == 64
    with pytest.raises(UsageError, match="nvfp4"):
        rotate_checkpoint(source, RotateOptions(scheme="nvfp4"), Target(tmp_path / "c"))


def test_sizes_without_a_construction_are_said_and_rotated_in_blocks(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", torch.float64, intermediate_size=92)
    result = rotate_checkpoint(source, RotateOptions("hadamard"), Target(tmp_path / "rotated"))
    assert result.notes["online"] == {"mlp_out": {"block": 4}}
    assert [line for line in result.said if "92" in line]


def test_norms_behind_the_writers_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "gemma2")
    with pytest.raises(InputRejected, match="gemma2"):
        rotate_checkpoint(source, RotateOptions("hadamard"), Target(tmp_path / "rotated"))
    rotated(source, tmp_path / "blocks", kind="block")


def test_stored_dtype_is_kept_or_the_one_asked_for(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    kept = open_checkpoint(rotated(source, tmp_path / "kept", kind="hadamard"))
    assert {t.dtype for t in kept.tensors.values()} == {torch.bfloat16}
    wide = rotated(source, tmp_path / "wide", kind="hadamard", dtype="float64")
    assert {t.dtype for t in open_checkpoint(wide).tensors.values()} == {torch.float64}
    assert difference(logits(source, tokens()), logits(wide, tokens())) < FLOAT64


@pytest.mark.parametrize(
    "options",
    [{"kind": "dense"}, {"block": 48}, {"sites": ("mlp",)}, {"kind": "hadamard", "parts": ("r9",)}],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    with pytest.raises(UsageError):
        rotated(source, tmp_path / "rotated", **options)
    assert not (tmp_path / "rotated").exists()
