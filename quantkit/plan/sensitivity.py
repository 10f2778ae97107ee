"""What each site would cost in each format, in nats, from one pass back through the model.

Rounding a site adds an error e_t to what its linears give at token t. To second order the model's
predictions move by 1/2 sum_t E[(g_t . e_t)^2] nats, g_t being the gradient of the loss at the same
place for labels drawn from the model itself (Fisher information; errors of different tokens taken
as independent). So one pass forward and one back give the gradients, and every format of every
site is judged by its own error against them, while the block is in memory. Blocks are
differentiated one by one from the last to the first: memory holds the hidden states, not the graph
of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit import console
from quantkit.diagnose.packing import pack_site
from quantkit.diagnose.switches import Rounded, SiteSwitch, SwitchLinear, install
from quantkit.kernels import reference
from quantkit.model.block import BlockRunner
from quantkit.model.sites import Site
from quantkit.pack.job import Job

Costs = dict[str, dict[str, float]]
"""Nats per token by site key and name of the format."""

ROWS = 256  # of logits whose probabilities are held at once
TOKENS = 512  # of each window, evenly spread, on which the errors are taken


@dataclass
class _Read:
    """What a site's linears read and gave in one window: rows are the tokens looked at."""

    x: Tensor
    outputs: list[tuple[SwitchLinear, Tensor]] = field(default_factory=list)


def sensitivities(
    runner: BlockRunner,
    tokens: Tensor,
    jobs: Mapping[str, Job],
    *,
    seed: int = 0,
    known: Costs | None = None,
    keep: Callable[[Costs], None] = lambda found: None,
) -> Costs:
    """Estimate what each of `jobs` costs at each site, in nats per token, on `tokens` [n, seq].

    Args:
        seed: draws the labels.
        known: costs of an interrupted run; sites in it are not measured again.
        keep: called with everything found so far after each block.
    """
    layout, found = runner.layout, dict(known or {})
    windows = [tokens[i : i + 1].to(runner.device) for i in range(len(tokens))]
    scored = len(tokens) * (tokens.shape[1] - 1)
    with console.progress("sensitivities", 2 * layout.n_layers) as progress:
        states = _forward(runner, windows, progress)
        back = _from_head(runner, states.pop(), seed)
        for layer in reversed(range(layout.n_layers)):
            block = runner.load(layer)
            if layer:
                runner.prefetch(layer - 1)
            switches = install(block, layout, layer, _never, {})
            todo = [s for key, s in switches.items() if key not in found]
            judged = _Block(runner, block, todo, jobs)
            inputs = states.pop()
            back = [judged.window(h, g) for h, g in zip(inputs, back, strict=True)]
            for key, sums in judged.sums.items():
                found[key] = {name: total / scored for name, total in sums.items()}
            if todo:
                keep(found)
            progress.advance(1, f"layer {layer + 1} of {layout.n_layers}")
    return found


def _forward(
    runner: BlockRunner, windows: Sequence[Tensor], progress: console.Progress
) -> list[list[Tensor]]:
    """The hidden states in front of every block, and behind the last: plain model."""
    with torch.no_grad():
        states = [[runner.embed(window) for window in windows]]
        for layer in range(runner.layout.n_layers):
            block = runner.load(layer)
            runner.prefetch((layer + 1) % runner.layout.n_layers)
            states.append([runner.forward(block, hidden) for hidden in states[-1]])
            progress.advance(1, f"layer {layer + 1} of {runner.layout.n_layers}")
    return states


def _from_head(runner: BlockRunner, states: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gradients of the summed loss at the last block's output, labels drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for hidden in states:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = runner.head(leaf)
        with torch.no_grad():
            slope = torch.empty_like(logits)
            for part, out in zip(logits[0].split(ROWS), slope[0].split(ROWS), strict=True):
                odds = part.float().softmax(-1)
                # drawn on the CPU: the same labels on every device
                draw = torch.rand(len(part), 1, generator=generator).to(odds.device)
                label = torch.searchsorted(odds.cumsum(-1), draw).clamp(max=odds.shape[1] - 1)
                out.copy_(odds.scatter_add_(1, label, -torch.ones_like(draw)))
            slope[:, -1] = 0  # the last token predicts nothing that is scored
        (gradient,) = torch.autograd.grad(logits, leaf, slope)
        found.append(gradient)
    return found


class _Block:
    """One block, window by window: its gradient, and the errors of the sites that are wanted."""

    def __init__(
        self,
        runner: BlockRunner,
        block: nn.Module,
        sites: Sequence[SiteSwitch],
        jobs: Mapping[str, Job],
    ) -> None:
        self.runner, self.block, self.jobs = runner, block, jobs
        self.sites = {switch.site.key: switch for switch in sites}
        self.rounded: dict[tuple[str, str], Rounded | None] = {}
        self.sums: Costs = {key: dict.fromkeys(jobs, 0.0) for key in self.sites}

    def window(self, hidden: Tensor, slope: Tensor) -> Tensor:
        """Take the errors on one window; gives the gradient at the block's input."""
        leaf = hidden.detach().requires_grad_()
        seen: dict[str, dict[int, _Read]] = {key: {} for key in self.sites}
        hooks = [
            module.register_forward_hook(_noting(seen[key]))
            for module in self.block.modules()
            if isinstance(module, SwitchLinear) and (key := module.switch.site.key) in seen
        ]
        with torch.enable_grad():
            output = self.runner.forward(self.block, leaf)
        for hook in hooks:
            hook.remove()
        reads = [(key, read) for key, of_site in seen.items() for read in of_site.values()]
        places = [y for _, read in reads for _, y in read.outputs]
        gradient, *slopes = torch.autograd.grad(output, [leaf, *places], slope, allow_unused=True)
        at = iter(slopes)
        with torch.no_grad():
            for key, read in reads:
                self._judge(key, read, [next(at) for _ in read.outputs])
        return gradient

    def _judge(self, key: str, read: _Read, slopes: Sequence[Tensor | None]) -> None:
        rows = read.x.shape[:-1].numel()
        if not rows:
            return
        every = max(rows // TOKENS, 1)
        x = read.x.reshape(rows, -1)[::every]
        parts = [
            (linear, g.reshape(rows, -1)[::every])
            for (linear, _), g in zip(read.outputs, slopes, strict=True)
            if g is not None
        ]
        # g . (W x) = (W^T g) . x, and one projected gradient serves the exact and the rounded x
        exact = _products(x, [(linear.weight, g) for linear, g in parts])
        for name in self.jobs:
            rounded = self._round(key, name)
            if rounded is None:
                continue
            operand = reference.input_operand(
                x, rounded.fmt, rounded.rule, rounded.channels, rounded.divisor
            )
            moved = _products(operand, [(rounded.weights[lin.name], g) for lin, g in parts])
            self.sums[key][name] += 0.5 * float((moved - exact).square().sum()) * rows / len(x)

    def _round(self, key: str, name: str) -> Rounded | None:
        if (key, name) not in self.rounded:
            switch = self.sites[key]
            self.rounded[key, name] = pack_site(self.jobs[name], switch.site, switch.weights())
        return self.rounded[key, name]


def _products(x: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over linears of g . (W x), [tokens], for x [tokens, in] and (W, g [tokens, out])."""
    total = torch.zeros(len(x), device=x.device)
    for weight, g in parts:
        # bfloat16's rounding of the projection is far below that of the formats
        total += ((g.to(weight.dtype) @ weight).float() * x.float()).sum(-1)
    return total


def _noting(reads: dict[int, _Read]) -> Callable[[SwitchLinear, tuple[Tensor], Tensor], None]:
    """A hook that keeps what a linear read and gave; readers of one tensor share a `_Read`."""

    def note(linear: SwitchLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        reads.setdefault(id(x), _Read(x)).outputs.append((linear, output))

    return note


def _never(site: Site, mode: Hashable, weights: Mapping[str, Tensor]) -> Rounded | None:
    return None
