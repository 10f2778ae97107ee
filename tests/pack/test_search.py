"""Searched block scales: never worse than the rule's, and what the bytes say is what was judged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.formats import mxfp4, nvfp4
from quantkit.kernels import reference
from quantkit.pack.grid import Grid, rule_grid
from quantkit.pack.rounding import round_weight
from quantkit.pack.rtn import global_divisor, round_nearest
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.search import FOUR_OVER_SIX, block_error, search_grid


def heavy_tailed(seed: int, out: int = 32, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, width, generator=generator)
    return w * torch.exp(0.7 * torch.randn(out, width, generator=generator))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_block_gets_worse_and_some_get_better(name: str, weighted: bool) -> None:
    w = heavy_tailed(0)
    w[3, 32:64] = 0
    importance = torch.logspace(-2, 2, 128) if weighted else None
    divisor = global_divisor([w]) if name == "nvfp4" else None
    rule = rule_grid(w, name, "even", divisor)
    found = search_grid(w, name, "even", divisor, importance)
    before, after = (block_error(w, grid, importance) for grid in (rule, found))
    assert (after <= before).all()
    if name != "mxfp8":
        assert after.sum() < 0.97 * before.sum()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8"])
def test_the_bytes_are_the_rounded_values(name: str) -> None:
    w = heavy_tailed(1)
    divisor = global_divisor([w]) if name == "nvfp4" else None
    grid = search_grid(w, name, "even", divisor)
    decoded = reference.dequantized_weight(grid.encode(w), SiteFormat(name, name))
    assert torch.equal(decoded, grid.round(w))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8"])
def test_the_rule_s_grid_is_round_to_nearest(name: str) -> None:
    w = heavy_tailed(2)
    fmt = SiteFormat(name, name)
    divisor = global_divisor([w]) if name == "nvfp4" else None
    expected = round_nearest(w, fmt, "even", divisor)
    found = rule_grid(w, name, "even", divisor).encode(w)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_exhaustive_choice_of_exponents() -> None:
    w = heavy_tailed(3, out=4)
    grid = search_grid(w, "mxfp4", "even")
    base = rule_grid(w, "mxfp4", "even").scale
    errors = torch.stack([block_error(w, Grid("mxfp4", base + s), None) for s in (0, -1, 1)])
    assert torch.equal(block_error(w, grid, None), errors.amin(0))


def test_four_over_six_uses_one_of_its_two_scales() -> None:
    w = heavy_tailed(4)
    divisor = global_divisor([w])
    grid = search_grid(w, "nvfp4", "even", divisor, factors=FOUR_OVER_SIX)
    amax = w.unflatten(1, (-1, 16)).abs().amax(-1)
    six, four = (nvfp4.block_scale(amax, divisor, largest) for largest in (6.0, 4.0))
    assert ((grid.scale == six) | (grid.scale == four)).all()
    assert (grid.scale == four).any()
    assert (grid.scale == six).any()
    fmt = SiteFormat("nvfp4", "nvfp4")
    packed = round_weight(w, fmt, method="rtn", divisor=divisor, four_over_six=True)
    assert torch.equal(packed["weight_scale"].float(), grid.scale)


def test_search_by_name_weighs_by_the_moments() -> None:
    w, importance = heavy_tailed(5), torch.logspace(-3, 3, 128)
    packed = round_weight(w, SiteFormat("mxfp4", "mxfp4"), method="search", hessian=importance)
    grid = search_grid(w, "mxfp4", "even", None, importance)
    codes, scale = mxfp4.quantize_with_exponents(w, grid.scale)
    assert torch.equal(packed["weight_packed"], codes)
    assert torch.equal(packed["weight_scale"], scale)
