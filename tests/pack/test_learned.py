"""Learned rounding: its arithmetic is the packed one, it lowers the loss, it stays in bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.step import Target
from quantkit.errors import UsageError
from quantkit.kernels import reference
from quantkit.pack.graphed import Graphed
from quantkit.pack.grid import rule_grid
from quantkit.pack.job import PackOptions
from quantkit.pack.layout import index_tensor
from quantkit.pack.learned import LearnedLinear, Learning, SharedOperand, learn, spacing
from quantkit.pack.pack import pack
from quantkit.pack.rounding import Rounded
from quantkit.pack.rtn import global_divisor
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors, main_and_branch
from tests.pack.test_sequential import excess, same
from tests.tiny import calibrate_tiny

OUT, WIDTH = 48, 64
CHANNELS = torch.tensor([3, 17, 40])
FORMATS = [
    SiteFormat("mxfp4", "mxfp4"),
    SiteFormat("mxfp4", "mxfp4", hadamard={"block": 32}),
    SiteFormat("nvfp4", "nvfp4", "fp8", outliers=16),
    SiteFormat("mxfp4", "mxfp4", "bf16", outliers=16, hadamard={"block": 32}),
    SiteFormat("mxfp8", "mxfp8"),
    SiteFormat("nvfp4", "nvfp4", "residual", outliers=16),
    SiteFormat("mxfp4", "mxfp4", "residual", outliers=32, hadamard={"block": 32}),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(
    fmt: SiteFormat, device: str = "cpu"
) -> tuple[LearnedLinear, dict[str, torch.Tensor], torch.Tensor]:
    """A learned linear, the packed tensors of the same weight, and the weight itself."""
    w, channels = draw(OUT, WIDTH).to(device), CHANNELS.to(device) if fmt.branch else None
    rest, columns = main_and_branch(w, channels, fmt)
    divisor = torch.full((1,), 64.0, device=device) if fmt.activations == "nvfp4" else None
    grid = rule_grid(
        rest, fmt.weights, "even", global_divisor([rest]) if fmt.weights == "nvfp4" else None
    )
    rounded = Rounded(rest, grid, columns)
    tensors = rounded.encode()
    if columns is not None:
        tensors |= branch_tensors(columns, CHANNELS, fmt)
    if fmt.branch == "residual":
        tensors["outlier_index"] = index_tensor(CHANNELS, fmt.outliers)
    if divisor is not None:
        tensors["input_global_scale"] = divisor
    shared = SharedOperand(fmt, "even", channels, divisor)
    return LearnedLinear(rounded, shared, None), tensors, w


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.words())
def test_what_is_trained_is_what_will_run(fmt: SiteFormat) -> None:
    linear, tensors, _ = linear_of(fmt)
    x = draw(2, 5, WIDTH, seed=1)
    wanted = reference.packed_linear(x, tensors, fmt, "even")
    torch.testing.assert_close(linear(x).detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.words())
def test_gradients_are_those_of_the_unrounded_product(fmt: SiteFormat) -> None:
    linear, _, w = linear_of(fmt)
    x = draw(1, 4, WIDTH, seed=2).requires_grad_()
    given = draw(1, 4, OUT, seed=3)
    (found,) = torch.autograd.grad((linear(x) * given).sum(), x)
    # Straight through: the gradient of x meets the rounded weight, itself near the exact one.
    exact = given[0] @ w
    assert float((found[0] - exact).norm() / exact.norm()) < 0.2


def test_spacing_is_the_distance_of_neighbours() -> None:
    w = torch.tensor([[0.1, 0.6, 1.2, 2.5, 5.0] + [6.0] * 27])
    grid = rule_grid(w, "mxfp4", "even")
    assert float(grid.step()[0, 0]) == 1.0
    wanted = torch.tensor([0.5, 0.5, 0.5, 1.0, 2.0, 2.0])
    torch.testing.assert_close(spacing(w, grid)[0, :6], wanted)


@pytest.mark.parametrize("fmt", [*FORMATS[:4], FORMATS[5]], ids=lambda f: f.words())
def test_lower_loss_within_the_travel(fmt: SiteFormat) -> None:
    linear, _, w = linear_of(fmt)
    start = linear.latent.detach().clone()
    mixed = draw(8, WIDTH, seed=9)  # correlated inputs: errors of columns can cancel
    inputs = [draw(4, 32, 8, seed=i) @ mixed for i in range(4)]
    pairs = [(x, x @ w.t()) for x in inputs]
    learning = Learning(steps=60, travel=0.5)
    before, after = learn({"it": linear}, linear.forward, pairs, learning)
    assert after < 0.95 * before
    moved = (linear.latent.detach() - start).abs()
    assert bool((moved <= linear.reach * 0.5 * 1.02 + 1e-6).all())


def test_what_does_not_help_is_taken_back() -> None:
    linear, _, _ = linear_of(FORMATS[0])
    start = linear.latent.detach().clone()
    x = draw(4, 32, WIDTH)
    target = linear(x).detach()  # nothing can be better than what it starts with
    before, after = learn({"it": linear}, linear.forward, [(x, target)], Learning(steps=5))
    assert before == after == 0.0
    assert torch.equal(start, linear.latent.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS[:4], ids=lambda f: f.words())
def test_replayed_steps_are_the_steps(fmt: SiteFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = draw(8, WIDTH, seed=9).cuda()
    inputs = [draw(4, 32, 8, seed=i).cuda() @ mixed for i in range(4)]

    def learned() -> torch.Tensor:
        linear, _, w = linear_of(fmt, "cuda")
        pairs = [(x, x @ w.t()) for x in inputs]
        before, after = learn({"it": linear}, linear.forward, pairs, Learning(steps=40))
        assert after < before
        return linear.latent.detach()

    replayed = learned()
    assert torch.equal(replayed, learned())
    monkeypatch.setattr(Graphed, "_record", lambda self: False)  # every step by itself
    torch.testing.assert_close(replayed, learned())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_closer_than_gptq(family: str, tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path, family)

    def run(rounding: str, steps: int | None = None) -> Path:
        options = PackOptions("w4a4-plain", rounding=rounding, steps=steps)
        return pack(source, options, Target(tmp_path / rounding)).output

    gptq, learned = run("gptq"), run("learned", 30)
    assert excess(source, learned) < 0.95 * excess(source, gptq)
    assert not same(gptq, learned)


@pytest.mark.usefixtures("elsewhere")
def test_steps_belong_to_learned_rounding(tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path)
    with pytest.raises(UsageError, match="--steps"):
        pack(source, PackOptions("w4a4", steps=3), Target(tmp_path / "out"))
