"""The manifest survives its own file and nothing that is not one passes for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.manifest import (
    Manifest,
    Step,
    combine_digests,
    online_hadamards,
    read_manifest,
)
from quantkit.errors import InputRejected


def test_round_trip(tmp_path: Path) -> None:
    step = Step("pack", {"scheme": "osc", "sites": {"mlp_out": "mxfp8"}}, 3, {"torch": "2"}, "d")
    manifest = Manifest([Step("calibrate"), step], "abc", {"w": "00"})
    (tmp_path / "quantkit.json").write_bytes(manifest.encode())
    assert read_manifest(tmp_path) == manifest
    assert manifest.last("pack") == step
    assert manifest.last("rotate") is None


def test_none_without_a_file(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


GOOD: dict[str, Any] = json.loads(Manifest([Step("x")]).encode())


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {},
        GOOD | {"format": 2},
        GOOD | {"steps": {}},
        GOOD | {"steps": ["x"]},
        GOOD | {"steps": [{"options": {}}]},
        GOOD | {"steps": [{"verb": 3}]},
        GOOD | {"steps": [{"verb": "x", "surprise": 1}]},
        GOOD | {"steps": [{"verb": "x", "seconds": "long"}]},
        GOOD | {"steps": [{"verb": "x", "notes": None}]},
        GOOD | {"tensors": ["a"]},
        GOOD | {"tensors": {"a": 1}},
        GOOD | {"weights_digest": 5},
    ],
    ids=lambda bad: json.dumps(bad)[:60],
)
def test_anything_else_is_rejected(tmp_path: Path, bad: object) -> None:
    (tmp_path / "quantkit.json").write_text(json.dumps(bad))
    with pytest.raises(InputRejected):
        read_manifest(tmp_path)


def test_digest_is_literally_this() -> None:
    weights = {"b": (torch.uint8, (2,), "11"), "a": (torch.bfloat16, (1, 2), "00")}
    # sha256 of '["a", "BF16", [1, 2], "00"]\n["b", "U8", [2], "11"]\n'
    expected = "08d9acef1fe7c5ae7e9ed8716a86abb316e4d876799d371a927d2ad3eb824265"
    assert combine_digests(weights) == expected


def test_online_transforms_of_later_steps_win() -> None:
    first = Step("rotate", notes={"online": {"mlp_out": {"size": 64}, "attn_out": {"block": 32}}})
    manifest = Manifest(
        [first, Step("smooth"), Step("rotate", notes={"online": {"mlp_out": None}})]
    )
    assert online_hadamards(manifest) == {"mlp_out": None, "attn_out": {"block": 32}}
    assert online_hadamards(None) == {}


@pytest.mark.parametrize(
    "online", [[], 3, {"a": 3}, {"a": {"size": 0}}, {"a": {"x": 2}}, {"a": {"size": True}}], ids=str
)
def test_online_transforms_that_are_none_are_rejected(online: object) -> None:
    with pytest.raises(InputRejected, match="online transforms"):
        online_hadamards(Manifest([Step("rotate", notes={"online": online})]))
