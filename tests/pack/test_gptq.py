"""GPTQ against its objective: output error on inputs, in float64, never a tolerance on luck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.pack.gptq import compensate, towards
from quantkit.pack.grid import Grid, rule_grid
from quantkit.pack.rounding import round_for_inputs, round_weight
from quantkit.pack.rtn import global_divisor
from quantkit.pack.scheme import SiteFormat

FORMATS = ("mxfp4", "nvfp4", "mxfp8")


def correlated(tokens: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    scale = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return torch.randn(tokens, width, generator=generator) @ mix * scale


def weight(out: int, width: int, seed: int) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def grid_for(name: str, w: Tensor) -> Grid:
    return rule_grid(w, name, "even", global_divisor([w]) if name == "nvfp4" else None)


def output_error(x: Tensor, w: Tensor, rounded: Tensor) -> float:
    return float((x.double() @ (rounded - w).double().T).square().sum())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("width", [64, 192])
def test_less_output_error_than_nearest(name: str, width: int) -> None:
    x, w = correlated(2000, width, 0), weight(48, width, 1)
    grid = grid_for(name, w)
    latent, _, found = compensate(w, x.T @ x, lambda _: grid)
    assert found is grid
    assert output_error(x, w, grid.round(latent)) < 0.8 * output_error(x, w, grid.round(w))


@pytest.mark.parametrize("name", FORMATS)
def test_the_textbook_algorithm(name: str) -> None:
    """Column by column in float64, in visiting order, with the inverse taken anew each time."""
    x, w = correlated(500, 64, 2), weight(8, 64, 3)
    grid, hessian = grid_for(name, w), x.T @ x
    latent, _, _ = compensate(w, hessian, lambda _: grid, damping=0.01)
    damped = hessian.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True, stable=True)
    current = w.double()
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        error = current[:, column] - grid.round(current.float())[:, column].double()
        keep = current[:, column].clone()
        current[:, rest] -= torch.outer(error, inverse[0] / inverse[0, 0])
        current[:, column] = keep
    agree = grid.round(latent) == grid.round(current.float())
    assert agree.float().mean() > 0.99  # float32 sums may tip a tie, nothing more
    assert output_error(x, w, grid.round(latent)) <= 1.02 * output_error(
        x, w, grid.round(current.float())
    )


def test_white_inputs_leave_nothing_to_compensate() -> None:
    w = weight(16, 64, 4)
    grid = grid_for("mxfp4", w)
    latent, _, _ = compensate(w, torch.eye(64), lambda _: grid)
    assert torch.equal(grid.round(latent), grid.round(w))


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(64, 64),
        torch.ones(64, 64),
        torch.diag(torch.tensor([1.0] * 32 + [0.0] * 32)),
        torch.outer(torch.logspace(-18, 18, 64), torch.logspace(-18, 18, 64)),
        -torch.eye(64) * 1e-9 + torch.ones(64, 64),
    ],
)
def test_singular_moments_never_fail(hessian: Tensor) -> None:
    w = weight(8, 64, 5)
    grid = grid_for("mxfp4", w)
    latent, _, _ = compensate(w, hessian, lambda _: grid)
    assert torch.isfinite(latent).all()
    dead = hessian.diagonal() <= 0
    assert torch.equal(latent[:, dead], w[:, dead])


def test_moments_that_are_not_finite_are_refused() -> None:
    w = weight(8, 64, 5)
    with pytest.raises(QuantkitError, match="not finite"):
        compensate(w, torch.full((64, 64), torch.nan), lambda _: grid_for("mxfp4", w))


def test_the_branch_takes_up_error() -> None:
    x = correlated(2000, 64, 6)
    x = torch.cat([x, x[:, :8] + 0.1 * correlated(2000, 8, 7)], 1)  # a branch that sees the rest
    w = weight(16, 72, 8)
    fmt = SiteFormat("mxfp4", "mxfp4", "bf16", outliers=16)
    done = round_for_inputs(w[:, :64], w[:, 64:], fmt, x.T @ x, "even")
    assert done.branch is not None
    rounded = done.grid.round(done.latent)
    moved = output_error(x, w, torch.cat([rounded, done.branch], 1))
    assert moved < 0.9 * output_error(x, w, torch.cat([rounded, w[:, 64:]], 1))


def test_same_bytes_and_no_global_random_state() -> None:
    x, w = correlated(500, 64, 9), weight(8, 64, 10)
    fmt = SiteFormat("mxfp4", "mxfp4")
    before = torch.random.get_rng_state()
    one, two = (round_weight(w, fmt, method="gptq", hessian=x.T @ x) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_moments_and_unknown_methods() -> None:
    fmt = SiteFormat("mxfp4", "mxfp4")
    with pytest.raises(UsageError, match="has seen"):
        round_weight(weight(8, 64, 0), fmt, method="gptq")
    with pytest.raises(UsageError, match="unknown rounding"):
        round_weight(weight(8, 64, 0), fmt, method="dice")


def test_towards_is_the_least_squares_weight() -> None:
    generator = torch.Generator().manual_seed(5)
    exact = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    noisy = exact + 0.3 * torch.randn(400, 24, generator=generator, dtype=torch.float64)
    w = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    hessian, cross = noisy.t() @ noisy / 400, exact.t() @ noisy / 400
    found = towards(w, hessian, cross, ridge=0.0)
    wanted = torch.linalg.lstsq(noisy, exact @ w.t()).solution.t()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)
    held = towards(w, hessian, cross, ridge=1e9)
    torch.testing.assert_close(held, w.float(), rtol=1e-4, atol=1e-5)


def test_towards_changes_nothing_where_inputs_agree_or_are_dead() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(6))
    x[:, 3] = 0
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    moments = x.t() @ x / 50
    torch.testing.assert_close(towards(w, moments, moments), w)
    cross = moments * 1.1
    assert torch.equal(towards(w, moments, cross)[:, 3], w[:, 3])
