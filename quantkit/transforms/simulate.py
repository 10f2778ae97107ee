"""The error a linear will have once packed: both operands rounded as the scheme will round them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.transforms.hadamard import rotate

FORMATS = ("mxfp4", "mxfp8", "nvfp4", "int4", "none")
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Simulation:
    """What a packed linear does to its operands.

    `int4` is symmetric with one scale per row: per token for activations and per output channel
    for weights, as in the SmoothRot papers. `group`: of each such many channels the one that is
    oftenest the outlier leaves the rounding (None: no separation). `hadamard` is the size of the
    online transform applied to the rest of both operands (None: no transform).
    """

    weights: str = "mxfp4"
    activations: str = "mxfp4"
    rule: str = "even"
    hadamard: int | None = None
    group: int | None = None

    def kept(self, x: Tensor) -> Tensor | None:
        """Which channels of x [tokens, width] stay in the rounding: 1 or 0 [width]; None: all.

        The mode of the group's argmax over tokens whose largest magnitude exceeds five times the
        mean (2604.12782, algorithm 1).
        """
        if self.group is None:
            return None
        magnitude = x.abs()
        top, place = magnitude.unflatten(-1, (-1, self.group)).max(-1)
        channel = place + torch.arange(top.shape[1], device=x.device) * self.group
        hits = torch.bincount(channel[top > 5 * magnitude.mean()], minlength=x.shape[1])
        chosen = hits.view(-1, self.group).max(-1)
        first = torch.arange(top.shape[1], device=x.device) * self.group
        keep = torch.ones(x.shape[1], device=x.device)
        keep[(first + chosen.indices)[chosen.values > 0]] = 0
        return keep

    def transform(self, x: Tensor) -> Tensor:
        """Apply the online Hadamard to operands [.., width]."""
        return x if self.hadamard is None else rotate(x, self.hadamard)


def fake_quantize(x: Tensor, name: str, rule: str = "even") -> Tensor:
    """Round [.., width] to format `name` and back, in the dtype of `x`."""
    if name == "mxfp4":
        return mxfp4.fake_quantize(x, rule)
    if name == "mxfp8":
        return mxfp8.fake_quantize(x, rule)
    if name == "nvfp4":
        return nvfp4.fake_quantize(x)
    if name == "int4":
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
        return (x / step).round_() * step
    if name == "none":
        return x
    raise ValueError(f"unknown format {name!r}: one of {', '.join(FORMATS)}")


def straight_through(x: Tensor, name: str, rule: str = "even") -> Tensor:
    """`fake_quantize` with a gradient: rounding passes it straight through, and so does the scale.

    The rounding error of a group is taken to be proportional to the group's largest magnitude,
    which is how `x` feels the range it causes. An MX scale follows that magnitude in steps of two;
    the gradient follows it continuously. (Holding the exponent constant instead leaves the channel
    that sets the scale without a signal: on MXFP4 without a Hadamard it ends at larger errors.)
    """
    if name == "none":
        return x
    group = {"mxfp4": mxfp4.BLOCK, "mxfp8": mxfp8.BLOCK, "nvfp4": nvfp4.BLOCK}.get(name)
    return _Rounded.apply(x, lambda v: fake_quantize(v, name, rule), group or x.shape[-1])


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[[Tensor], Tensor], group: int) -> Tensor:
        rounded = quantize(x)
        ctx.group = group
        ctx.save_for_backward(x, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded = ctx.saved_tensors
        blocks = x.unflatten(-1, (-1, ctx.group))
        magnitude = blocks.abs()
        top = magnitude.amax(-1, keepdim=True)
        pull = ((rounded - x) * grad).unflatten(-1, (-1, ctx.group)).sum(-1, keepdim=True)
        pull = torch.where(top == 0, 0, pull / top)
        # To the largest magnitude of each group (both, where two are equal).
        share = (magnitude == top) * blocks.sign() * pull
        return grad + share.flatten(-2), None, None


def output_error(
    x: Tensor,
    w: Tensor,
    simulation: Simulation,
    scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[float, float]:
    """Frobenius error of `Q(x / s) Q(w s)^T` against `x w^T`: (raw, relative to the output).

    x [tokens, width], w [out, width], scale [width] or None for no smoothing; kept [width] is 0 for
    the channels that leave the rounding (`Simulation.kept` of x / s).
    """
    rest = w if kept is None else w * kept
    weight = simulation.transform(rest if scale is None else rest * scale)
    weight = fake_quantize(weight, simulation.weights, simulation.rule)
    squared = reference = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(TOKENS_AT_ONCE):
        part = part.to(w.dtype)
        exact = part @ w.T
        reference = reference + exact.square().sum(dtype=torch.float64)
        if kept is not None:
            exact = part @ rest.T
            part = part * kept
        smoothed = simulation.transform(part if scale is None else part / scale)
        rounded = fake_quantize(smoothed, simulation.activations, simulation.rule)
        squared = squared + (rounded @ weight.T - exact).square().sum(dtype=torch.float64)
    left, whole = float(squared), float(reference)  # waits for the device once
    return left**0.5, (left / max(whole, 1e-60)) ** 0.5
