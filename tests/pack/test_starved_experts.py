"""Experts that calibration showed too few tokens: their weights alone decide, the router stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.calibrate.store import load_statistics
from quantkit.calibrate.summary import summarize
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.model.families import describe
from quantkit.outliers.choose import choose, weight_energy
from quantkit.outliers.score import best_of_groups
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from tests.tiny import VOCAB, save_tiny

TOKENS = 8 * 32


@pytest.fixture(scope="module")
def starved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture in which only what is shown every token has statistics."""
    folder = tmp_path_factory.mktemp("starved")
    save_tiny(folder / "model", "qwen3_moe", torch.bfloat16)
    ids = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, folder / "tokens.safetensors")
    options = Options(
        f"{folder / 'tokens.safetensors'}:ids", device="cpu", min_expert_tokens=TOKENS + 1
    )
    result = calibrate(folder / "model", options, Target(folder / "calibrated"))
    assert result is not None
    assert len(result.starved) == 8
    assert "only their weights" in summarize(result)[1]
    return folder / "calibrated"


def test_the_threshold_travels_with_the_statistics(starved: Path) -> None:
    statistics = load_statistics(open_checkpoint(starved))
    assert not statistics.has("layers.0.experts.1.mlp_out")
    assert int(statistics.get("layers.0.experts.1.mlp_out", "count")) > 0
    assert statistics.has("layers.0.mlp_in")


def test_channels_by_weight(starved: Path) -> None:
    source = open_checkpoint(starved)
    layout = describe(source.config, source.tensors)
    site = layout.by_key["layers.1.experts.2.mlp_out"]
    plan = choose(source, [site], group=32)
    expected = best_of_groups(weight_energy(source, site), 32)
    assert plan.sites[site.key] == tuple(expected.tolist())
    assert site.key not in plan.density


@pytest.mark.parametrize(
    "options",
    [
        PackOptions("osc", mlp_out="mxfp4"),
        PackOptions("nvfp4"),
        PackOptions("mxfp4", rounding="search"),
        PackOptions("mxfp4", rounding="gptq"),
        PackOptions("w4a4"),
    ],
    ids=lambda options: f"{options.scheme}-{options.rounding}",
)
def test_packed_all_the_same(starved: Path, tmp_path: Path, options: PackOptions) -> None:
    result = pack(starved, options, Target(tmp_path / "out"))
    packed = open_checkpoint(result.output)
    for layer in range(2):
        router = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(packed.read(router), open_checkpoint(starved).read(router))
    for name, info in packed.tensors.items():
        tensor = packed.read(name)
        if info.dtype.is_floating_point and info.dtype.itemsize > 1:
            assert bool(tensor.isfinite().all()), name
        if name.endswith("input_global_scale"):
            assert float(tensor) > 0


def test_a_starved_expert_has_the_range_of_the_widest_other(tmp_path: Path) -> None:
    """NVFP4's static input scale: experts without statistics take their layer's smallest."""
    save_tiny(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    ids = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, tmp_path / "tokens.safetensors")
    spec = f"{tmp_path / 'tokens.safetensors'}:ids"
    probe = calibrate(tmp_path / "model", Options(spec, device="cpu"), Target(tmp_path / "probe"))
    assert probe is not None
    keys = [f"layers.0.experts.{e}.mlp_out" for e in range(4)]
    counts = [int(probe.statistics.get(key, "count")) for key in keys]
    least = sorted(counts)[1]  # one expert falls below, unless two are alike
    some = calibrate(
        tmp_path / "model",
        Options(spec, device="cpu", min_expert_tokens=least),
        Target(tmp_path / "some"),
    )
    assert some is not None
    out = pack(tmp_path / "some", PackOptions("nvfp4"), Target(tmp_path / "out")).output
    packed = open_checkpoint(out)
    scales = [
        float(packed.read(f"model.layers.0.mlp.experts.{e}.down_proj.input_global_scale"))
        for e in range(4)
    ]
    few = [e for e in range(4) if counts[e] < least]
    assert few
    for e in few:
        assert scales[e] == min(s for i, s in enumerate(scales) if i not in few)
