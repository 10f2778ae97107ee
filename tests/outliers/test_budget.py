"""The free choice of channels against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from quantkit.errors import UsageError
from quantkit.formats import mxfp4, nvfp4
from quantkit.outliers.budget import (
    branch_columns,
    choose_free,
    choose_lossy,
    evened,
    expected_loss,
)


def loss(energy: torch.Tensor, weights: torch.Tensor, chosen: tuple[int, ...], block: int) -> float:
    e, v = energy.clone(), weights.clone()
    e[list(chosen)] = v[list(chosen)] = 0
    return float((e.view(-1, block).sum(1) * v.view(-1, block).sum(1)).sum())


@pytest.mark.parametrize("seed", range(6))
def test_the_first_channel_is_the_best_and_more_help(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    energy, weights = (
        torch.exp(1.5 * torch.randn(16, generator=generator).double()) for _ in range(2)
    )
    one = choose_free(energy, weights, 1, "weighted", 4)
    assert loss(energy, weights, (int(one),), 4) == pytest.approx(
        min(loss(energy, weights, (c,), 4) for c in range(16))
    )
    three = tuple(choose_free(energy, weights, 3, "weighted", 4).tolist())
    best = min(loss(energy, weights, c, 4) for c in combinations(range(16), 3))
    assert list(three) == sorted(three)
    assert loss(energy, weights, three, 4) <= 1.1 * best
    assert loss(energy, weights, three, 4) < loss(energy, weights, (int(one),), 4)


def test_several_channels_of_one_block() -> None:
    energy = torch.ones(64)
    energy[[3, 5, 7]] = 100.0
    assert choose_free(energy, torch.ones(64), 3, "weighted", 32).tolist() == [3, 5, 7]
    assert choose_free(energy, torch.ones(64), 2, "energy", 32).tolist() == [3, 5]


def test_dead_channels_are_never_taken() -> None:
    energy = torch.tensor([0.0, 2.0, 0.0, 1.0])
    for criterion in ("energy", "output", "weighted"):
        assert choose_free(energy, torch.ones(4), 4, criterion, 4).tolist() == [1, 3]


def test_output_counts_the_weights() -> None:
    energy, weights = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    assert choose_free(energy, weights, 1, "output", 2).tolist() == [1]


def test_a_residual_takes_what_rounding_loses_most_of() -> None:
    energy, weights = torch.ones(64), torch.ones(64)
    energy[[3, 40]] = torch.tensor([100.0, 30.0])
    assert choose_lossy(energy, weights, 1, "weighted", "mxfp4").tolist() == [3]
    weights[40] = 9.0
    assert choose_lossy(energy, weights, 1, "weighted", "mxfp4").tolist() == [40]
    assert choose_lossy(energy, weights, 1, "energy", "mxfp4").tolist() == [3]
    weights[40] = 1.0
    beside = choose_lossy(energy, weights, 12, "weighted", "mxfp4").tolist()
    assert sum(c < 32 for c in beside) == 11, "small ones lose more beside the loudest"
    assert choose_lossy(torch.zeros(32), torch.ones(32), 4, "weighted", "nvfp4").tolist() == []
    with pytest.raises(UsageError, match="criterion"):
        choose_lossy(energy, weights, 1, "mode", "mxfp4")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 1.5])
def test_the_expected_loss_is_that_of_rounding(name: str, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(spread * torch.randn(2560, generator=generator))  # more than one piece
    x = torch.randn(2000, 2560, generator=generator) * size
    divisor = nvfp4.global_scale(x.abs().amax())
    rounded = mxfp4.fake_quantize(x) if name == "mxfp4" else nvfp4.fake_quantize(x, divisor)
    errors = (x - rounded).square().double()
    lost, again = errors[:1000].mean(0), errors[1000:].mean(0)
    before = torch.random.get_rng_state()
    found = expected_loss(size.double() ** 2, name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert float((found / lost).log().abs().median()) < 0.15
    chosen = choose_lossy(size**2, torch.ones(2560), 128, "weighted", name)
    assert float(again[chosen].sum()) > 0.97 * float(again[lost.topk(128).indices].sum())


def test_a_hadamard_evens_energies_out() -> None:
    energy = torch.tensor([4.0, 0.0, 1.0, 1.0])
    assert evened(energy, 2).tolist() == [2.0, 2.0, 1.0, 1.0]
    assert evened(energy, 0) is energy


def test_budgets() -> None:
    assert branch_columns(4096, 0.25, 8, 16) == 128
    assert branch_columns(4096, 0.25, 16, 16) == 64
    assert branch_columns(576, 0.25, 8, 16) == 16
    assert branch_columns(64, 0.01, 16, 16) == 16
    assert branch_columns(4096, 0.25, 4.25, 32) == 224
    with pytest.raises(UsageError, match="branch-bits"):
        branch_columns(64, 0, 8, 16)
    with pytest.raises(UsageError, match="criterion"):
        choose_free(torch.ones(4), torch.ones(4), 1, "luck", 4)
