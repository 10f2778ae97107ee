"""Learned rounding: a block's weights move so that the packed block does what the exact one did.

GPTQ's compensated weights are where it starts. Each step runs the packed block, activations
quantized, on hidden states of the packed model so far, and moves every weight by the sign of its
averaged gradient, a small part of its grid step; rounding passes gradients straight through. The
target is the unquantized block on the unquantized model's states, so a block also repairs what
earlier ones broke. Signed steps bounded by the grid: AutoRound (2309.05516); all weights of a
block at once: the first phase of EfficientQAT (2407.11062). Branch columns learn with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.kernels import reference
from quantkit.pack.graphed import Graphed
from quantkit.pack.grid import Grid
from quantkit.pack.rounding import Rounded
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import rounded_branch

Forward = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]  # hidden states of the packed model, of the exact one behind the block


@dataclass(frozen=True)
class Learning:
    """How long and how far: `travel` is the most a weight can move, in steps of its grid."""

    steps: int = 200
    travel: float = 0.5
    branch_travel: float = 0.05  # of the root mean square of the branch's columns
    momentum: float = 0.9
    seed: int = 0


class SharedOperand:
    """The quantized input of a site, with gradients: made once for q, k, v and for gate, up."""

    def __init__(
        self, fmt: SiteFormat, rule: str, channels: Tensor | None, divisor: Tensor | None
    ) -> None:
        self.format, self.rule, self.channels, self.divisor = fmt, rule, channels, divisor
        self._x: Tensor | None = None
        self._operand: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., in + k]: the quantized rest, then the branch's columns."""
        if self._x is x and self._operand is not None:
            return self._operand
        separated = None if self.format.branch == "residual" else self.channels
        rest = x if separated is None else x.index_fill(-1, separated, 0)
        if self.format.hadamard_size:
            from quantkit.transforms.hadamard import rotate

            rest = rotate(rest.float(), self.format.hadamard_size)
        operand = _straight(rest, self._quantized).to(x.dtype)
        if separated is None and self.channels is not None:
            operand = torch.cat([operand, self._residual(rest, self.channels).to(x.dtype)], -1)
        elif separated is not None:
            taken = x.index_select(-1, separated)
            taken = _straight(taken, lambda t: reference.branch_input(t, self.format))
            operand = torch.cat([operand, taken.to(x.dtype)], -1)
        self._x, self._operand = x, operand
        return operand

    def forget(self) -> None:
        """Let go of the last input and its graph."""
        self._x = self._operand = None

    def _residual(self, z: Tensor, channels: Tensor) -> Tensor:
        """The columns of a residual branch; no gradient: straight through, nothing was lost."""
        z = z.detach()
        lost = reference.residual(z, self._quantized(z), channels, self.format.outliers)
        return self._quantized(lost)

    def _quantized(self, x: Tensor) -> Tensor:
        return reference.quantize_activations(x, self.format.activations, self.rule, self.divisor)


class LearnedLinear(nn.Module):
    """A packed linear whose weight is still moving: the runtime's arithmetic with gradients."""

    def __init__(self, rounded: Rounded, shared: SharedOperand, bias: Tensor | None) -> None:
        super().__init__()
        self.shared, self.bias, self.grid = shared, bias, rounded.grid
        self.latent = nn.Parameter(rounded.latent.clone())
        self.branch: Tensor | None = None
        self.branch_size = 0.0
        if rounded.branch is not None:
            self.branch = nn.Parameter(rounded.branch.clone())
            self.branch_size = float(rounded.branch.square().mean().sqrt())
        self.reach = spacing(rounded.latent, rounded.grid)  # what one unit of travel is
        self._held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in the dtype of x."""
        weight = self.weight() if self._held is None else self._held
        return functional.linear(self.shared.of(x), weight.to(x.dtype), self.bias)

    def weight(self) -> Tensor:
        """The weight rounded, with gradients: [out, in + k], the branch's columns last."""
        weight = _straight(self.latent, self.grid.round)
        if self.branch is None:
            return weight
        branch = _straight(self.branch, lambda b: rounded_branch(b, self.shared.format))
        return torch.cat([weight, branch], 1)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Within it the weight does not move: it is rounded once."""
        with torch.no_grad():
            self._held = self.weight()
        try:
            yield
        finally:
            self._held = None

    def result(self) -> Rounded:
        """The weight as it stands."""
        branch = None if self.branch is None else self.branch.detach()
        return Rounded(self.latent.detach(), self.grid, branch)


def spacing(w: Tensor, grid: Grid) -> Tensor:
    """Distance between the grid's values around each weight [out, in]."""
    step, element = grid.steps(), grid.element
    units = (w.abs() / step).clamp(2.0**element.min_exponent, element.maximum)
    octave = (units.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 units)
    return octave.mul_(step).mul_(2.0**-element.mantissa_bits)


def _straight(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)` whose gradient is that of x."""
    return x + (rounding(x.detach()) - x.detach())


def learn(
    linears: Mapping[str, LearnedLinear],
    forward: Forward,
    pairs: Sequence[Pair],
    learning: Learning,
) -> tuple[float, float]:
    """Move the weights of `linears`, which `forward` runs through; mean losses before and after.

    A pair holds hidden states [batch, sequence, hidden] of the packed model in front of the block
    and of the exact one behind it. The loss is the squared error of each token relative to the
    mean square of its target, so that tokens with massive activations do not drown the others.
    What was learned is taken back when it did not lower the loss over all pairs.
    """
    moving = [p for linear in linears.values() for p in linear.parameters() if p.requires_grad]
    before = _loss(linears, forward, pairs)
    start = [p.detach().clone() for p in moving]
    averages = [torch.zeros_like(p) for p in moving]
    reaches = list(_reaches(linears, learning))

    def step_of(x: Tensor, target: Tensor, rate: Tensor) -> None:
        with torch.enable_grad(), same_every_time(x.device):
            loss = relative_error(forward(x), target)
            gradients = torch.autograd.grad(loss, moving)
        _forget(linears)
        for p, gradient, average, reach in zip(moving, gradients, averages, reaches, strict=True):
            average.lerp_(gradient, 1 - learning.momentum)
            p.data.addcmul_(average.sign().mul_(reach), rate, value=-1)

    take = Graphed(step_of)
    generator = torch.Generator().manual_seed(learning.seed)
    order: list[int] = []
    for step in range(learning.steps):
        if not order:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        # Distances add up to the travel over a cosine's fall to zero.
        rate = (1 + math.cos(math.pi * step / learning.steps)) / learning.steps
        take(*pairs[order.pop()], rate)
    after = _loss(linears, forward, pairs)
    if not after < before:
        for p, value in zip(moving, start, strict=True):
            p.data.copy_(value)
        return before, before
    return before, after


def _reaches(linears: Mapping[str, LearnedLinear], learning: Learning) -> Iterator[Tensor | float]:
    for linear in linears.values():
        yield linear.reach * learning.travel
        if linear.branch is not None:
            yield linear.branch_size * learning.branch_travel


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, float32 scalar."""
    difference = (output.float() - target.float()).square().mean(-1)
    return (difference / target.float().square().mean(-1).clamp_min(1e-12)).mean()


@contextmanager
def same_every_time(device: torch.device) -> Iterator[None]:
    """On a GPU, attention by the kernel whose gradients do not depend on the order of additions."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.MATH]):
        yield


@torch.no_grad()
def _loss(linears: Mapping[str, LearnedLinear], forward: Forward, pairs: Sequence[Pair]) -> float:
    losses = []
    with ExitStack() as stack:
        for linear in linears.values():
            stack.enter_context(linear.still())
        for i in range(len(pairs)):
            x, target = pairs[i]
            losses.append(relative_error(forward(x), target))
            _forget(linears)
    return float(torch.stack(losses).double().mean()) if losses else 0.0


def _forget(linears: Mapping[str, LearnedLinear]) -> None:
    for linear in linears.values():
        linear.shared.forget()
