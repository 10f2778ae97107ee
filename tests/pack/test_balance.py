"""Balanced channels: the same function, less of what 4-bit blocks lose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.calibrate.store import load_statistics
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.model.families import describe
from quantkit.pack.balance import balance_scale, balanced, weight_energy
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.runtime.load import load
from tests.tiny import calibrate_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")


def logits(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids = torch.randint(3, 256, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return load(path, dtype=dtype)(input_ids=ids).logits.double()


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3_text", "phi3"])
def test_the_function_is_the_same(family: str, tmp_path: Path) -> None:
    """With nothing rounded, only the gains' own type stands between the two."""
    source = calibrate_tiny(tmp_path, family, dtype=torch.float32)
    options = PackOptions("mxfp4", dtype="float32", balance=True)
    out = pack(source, options, Target(tmp_path / "out")).output
    changed = open_checkpoint(out).read("model.layers.0.input_layernorm.weight")
    assert not torch.equal(
        changed, open_checkpoint(source).read("model.layers.0.input_layernorm.weight")
    )
    before, after = logits(source), logits(out)
    assert (after - before).norm() < 1e-5 * before.norm()


def test_blocks_lose_as_little_as_scales_allow(calibrated: Path) -> None:
    source = open_checkpoint(calibrated)
    layout = describe(source.config, source.tensors)
    statistics = load_statistics(source)
    site = layout.by_key["layers.0.mlp_in"]
    energy, weights = statistics.get(site.key, "energy"), weight_energy(source, site)
    scale = balance_scale(site, energy, weights)

    def lost(s: torch.Tensor) -> float:
        e, v = (energy / s**2).view(-1, 32).sum(1), (weights * s**2).view(-1, 32).sum(1)
        return float((e * v).sum())

    least = lost(scale)
    assert least < lost(torch.ones_like(scale))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = torch.exp(0.1 * torch.randn(len(scale), generator=generator).double())
        assert lost(scale * noise) > least


def test_scales_of_shared_heads_agree(calibrated: Path) -> None:
    source = open_checkpoint(calibrated)
    layout = describe(source.config, source.tensors)
    site = layout.by_key["layers.1.attn_out"]
    _, scales = balanced(source, layout.sites, load_statistics(source))
    by_row: dict[int, float] = {}
    for row, s in zip(site.writer_rows().tolist(), scales[site.key].tolist(), strict=True):
        assert by_row.setdefault(row, s) == s


def test_dead_channels_keep_their_scale(calibrated: Path) -> None:
    source = open_checkpoint(calibrated)
    site = describe(source.config, source.tensors).by_key["layers.0.mlp_out"]
    energy = torch.ones(site.width, dtype=torch.float64)
    energy[5] = 0
    scale = balance_scale(site, energy, torch.linspace(0, 2, site.width).double())
    assert scale[5] == scale[0] == 1
    assert torch.isfinite(scale).all()
