"""Scale rules, exact quantiles from tails, and the searches; on one linear input at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import UsageError
from quantkit.transforms.learned import Training, learn
from quantkit.transforms.scales import (
    LIMIT,
    Problem,
    quantiles_of,
    search,
    smoothing_scale,
    tail_quantile,
)
from quantkit.transforms.simulate import (
    FORMATS,
    Simulation,
    fake_quantize,
    output_error,
    straight_through,
)


def outlier_problem(
    simulation: Simulation, tie: torch.Tensor | None = None, tokens: int = 384, width: int = 64
) -> Problem:
    """Gaussian activations with a few large channels, Gaussian weights."""
    generator = torch.Generator().manual_seed(3)
    size = torch.ones(width)
    size[::11] = 30.0
    x = torch.randn(tokens, width, generator=generator) * size
    w = torch.randn(48, width, generator=generator)
    return Problem(x[: tokens // 2], x[tokens // 2 :], w, simulation, tie)


def hostile_problem(simulation: Simulation) -> Problem:
    """Every rule hurts: quiet channels meet large weights, and the maxima are single tokens."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(512, 64, generator=generator)
    for channel in range(0, 64, 2):  # one spike a channel, in the fitted half only
        x[channel, channel] = 3000.0
    w = torch.randn(48, 64, generator=generator)
    return Problem(x[:256], x[256:], w, simulation)


def test_rule_is_the_published_formula_up_to_a_common_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    a, w = torch.rand(40, generator=generator) + 0.1, torch.rand(40, generator=generator) + 0.1
    s = smoothing_scale(a, w, 0.7)
    ratio = s / (a**0.7 / w**0.3)
    torch.testing.assert_close(ratio, ratio[:1].expand(40))
    torch.testing.assert_close(s.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_dead_channels_get_the_neutral_scale_and_wild_ones_are_clamped() -> None:
    s = smoothing_scale(torch.tensor([1.0, 0, 1e30, 1.0]), torch.tensor([1.0, 1, 1, 0]), 0.5)
    assert s[1] == s[3] == 1
    assert torch.isfinite(s).all()
    assert s.log().abs().max() <= LIMIT + 1e-6
    assert torch.equal(smoothing_scale(torch.zeros(4), torch.zeros(4), 0.5), torch.ones(4))


@given(st.integers(2, 300), st.floats(0.95, 1.0), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_quantile_from_the_tail_is_the_quantile(count: int, q: float, seed: int) -> None:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = min(count, int((1 - q) * count) + 2)
    tail = x.abs().topk(keep, 0).values[torch.randperm(keep)]
    expected = torch.quantile(x.abs(), q, dim=0)
    torch.testing.assert_close(tail_quantile(tail, count, q), expected)
    torch.testing.assert_close(quantiles_of(x.float(), (q,))[0], expected.float())


def test_a_tail_too_short_for_the_quantile_is_said() -> None:
    tail = torch.rand(10, 4)
    with pytest.raises(UsageError, match="needs the 51 largest") as error:
        tail_quantile(tail, 1001, 0.95)
    assert "0.991" in str(error.value.hint)
    tail_quantile(tail, 1001, 0.991)


@pytest.mark.parametrize("name", FORMATS)
def test_straight_through_has_the_values_of_the_format(name: str) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = straight_through(x, name)
    assert torch.equal(y.detach(), fake_quantize(x.detach(), name))
    y.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_int4_gradient_is_that_of_rounding_with_a_moving_step() -> None:
    # d/dx of step * round(x / step) with the rounding passed straight through: autograd's own.
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (straight_through(a, "int4") * weight).sum().backward()
    step = b.abs().amax(-1, keepdim=True) / 7
    code = b / step
    (((code.round() - code).detach() + code) * step * weight).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.grad)


def test_error_without_rounding_is_zero_and_ignores_the_scale() -> None:
    problem = outlier_problem(Simulation("none", "none", hadamard=64))
    scale = torch.rand(64) + 0.5
    raw, relative = output_error(problem.x, problem.w, problem.simulation, scale)
    assert relative < 1e-5
    assert raw > 0


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_search_and_learning_improve_on_rules_in_order(name: str) -> None:
    problem = outlier_problem(Simulation(name, name, hadamard=64 if name == "int4" else 32))
    found = search(problem)
    assert found["joint"].error <= min(found["alpha"].error, found["quantile"].error)
    assert found["joint"].error < found["none"].error
    training = Training(steps=60, batch=96, check_every=10)
    learned = learn(problem, {"one": None, "joint": found["joint"].scale}, training)
    assert learned.error <= found["joint"].error
    assert learned.errors["one+trial"] < learned.errors["none"]
    assert learned.start.startswith(("one", "joint"))
    assert learned.error == problem.error(learned.scale)


def test_learning_is_repeatable() -> None:
    problem = outlier_problem(Simulation("int4", "int4"))
    training = Training(steps=20, batch=64)
    first, second = (learn(problem, {"one": None}, training) for _ in range(2))
    assert first.scale is not None
    assert second.scale is not None
    assert torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_doing_nothing_is_chosen_where_every_rule_hurts(name: str) -> None:
    problem = hostile_problem(Simulation(name, name))
    found = search(problem, alphas=(0.5, 0.75), quantiles=(0.9999, 1.0))
    assert found["alpha"].error > found["none"].error
    learned = learn(problem, {"joint": found["joint"].scale}, Training(steps=20))
    assert learned.error <= found["none"].error


def test_tied_channels_share_their_scale() -> None:
    tie = torch.arange(64) % 16
    problem = outlier_problem(Simulation("int4", "int4"), tie)
    found = search(problem, alphas=(0.4, 0.5), quantiles=(0.99, 1.0))["joint"].scale
    assert found is not None
    learned = learn(problem, {"one": None}, Training(steps=20)).scale
    assert learned is not None
    for scale in (found, learned):
        assert torch.equal(scale[:16].repeat(4), scale)
        assert scale[:16].unique().numel() > 1
