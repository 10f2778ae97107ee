"""Second moments: sums that do not depend on who added what in which order."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.parallel import Ranks
from quantkit.pack.gptq import compensate
from quantkit.pack.grid import rule_grid
from quantkit.pack.moments import SecondMoment, token_scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_in_any_order_and_over_any_processes_give_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    size = torch.logspace(-4, 3, 48)  # of the channels: outliers beside nearly nothing
    batches = [(torch.randn(256, 48, generator=generator) * size).to(dtype) for _ in range(9)]

    def mean(parts: list[list[int]]) -> torch.Tensor:
        totals = [SecondMoment(48, torch.device("cpu")) for _ in parts]
        for total, part in zip(totals, parts, strict=True):
            for b in part:
                total.add(batches[b])
        for other in totals[1:]:
            totals[0].total += other.total
        return totals[0].mean(9 * 256, Ranks())

    one = mean([[*range(9)]])
    assert torch.equal(one, mean([[8, 3, 1, 0, 2, 7, 6, 5, 4]]))
    assert torch.equal(one, mean([[0, 1, 2, 3], [4, 5, 6, 7, 8]]))
    assert torch.equal(one, mean([[7, 8], [0, 1, 2], [3, 4, 5, 6]]))
    x = torch.cat(batches).double()
    exact = x.t() @ x / len(x)
    root = exact.diagonal().sqrt()
    assert bool(((one - exact).abs() <= 1e-6 * torch.outer(root, root)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_token_scales_are_exact_and_even_out_what_tokens_weigh(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = torch.logspace(-15, 15, 64)[:, None]
    x = (torch.randn(64, 96, generator=generator) * sizes).to(dtype)
    scales = token_scales(x)
    assert scales.dtype == dtype
    assert bool((torch.frexp(scales.float()).mantissa == 0.5).all())  # powers of two
    even = x * scales
    assert torch.equal(even.double(), x.double() * scales.double())
    weights = even.double().square().mean(1)
    assert 0.99 < float(weights.min()) <= float(weights.max()) < 4.01
    nothing = torch.zeros(3, 8, dtype=dtype)
    assert torch.equal(nothing * token_scales(nothing), nothing)


def test_one_massive_token_does_not_cost_the_others() -> None:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(128, 128, generator=generator)
    x = torch.randn(2001, 128, generator=generator) @ mix
    x[0] = 0
    x[0, :4] = torch.tensor([3e5, -2e5, 1e5, 1e5])  # an attention sink's input of down_proj
    w = torch.randn(32, 128, generator=generator)
    grid = rule_grid(w, "mxfp8", "even")
    even = x * token_scales(x)
    latent, _, _ = compensate(w, even.T @ even / len(x), lambda _: grid)

    def lost(rounded: torch.Tensor, tokens: torch.Tensor) -> float:
        return float((tokens.double() @ (rounded - w).double().T).square().sum())

    nearest = lost(grid.round(w), x[1:])
    assert lost(grid.round(latent), x[1:]) < 0.7 * nearest
    plain, _, _ = compensate(w, x.T @ x / len(x), lambda _: grid)
    assert lost(grid.round(plain), x[1:]) > nearest  # what the scales are for
