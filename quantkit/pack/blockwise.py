"""Learned rounding in a sequential run: the exact model beside the packed one, block by block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calibrate.hidden import HiddenStates
from quantkit.model.block import BlockRunner
from quantkit.model.sites import Linear, Site
from quantkit.pack.job import Job
from quantkit.pack.learned import LearnedLinear, Learning, Pair, SharedOperand, learn
from quantkit.pack.modules import PackedBlock
from quantkit.pack.rounding import Rounded
from quantkit.pack.scheme import SiteFormat

STEP_TOKENS = 4096  # of one step of learning
HELD = 0.1  # of a GPU's free memory


@dataclass(frozen=True)
class RoundedGroup:
    """A fused group as GPTQ left it, waiting for the rest of its block."""

    site: Site
    format: SiteFormat
    linears: Sequence[Linear]
    rounded: Sequence[Rounded]


class Pairs(Sequence[Pair]):
    """Hidden states in front of a block of the packed model, and behind it of the exact one.

    Cut into pieces of about STEP_TOKENS tokens, taken to the device when asked for; they stay there
    when all of them take less than HELD of a GPU's free memory.
    """

    def __init__(
        self, packed: HiddenStates, exact: HiddenStates, layer: int, device: torch.device
    ) -> None:
        self.packed, self.exact, self.layer, self.device = packed, exact, layer, device
        samples = max(STEP_TOKENS // packed.shape[0], 1)
        self.pieces = [
            (b, slice(at, at + samples))
            for b, (first, last) in enumerate(packed.batches)
            for at in range(0, last - first, samples)
        ]
        self._here: dict[int, Pair] = {}
        tokens = sum(last - first for first, last in packed.batches) * packed.shape[0]
        size = 2 * tokens * packed.shape[1] * packed.dtype.itemsize
        self._stay = device.type == "cuda" and size < HELD * torch.cuda.mem_get_info(device)[0]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> Pair:  # type: ignore[override]  # one piece, no slices
        if i in self._here:
            return self._here[i]
        b, part = self.pieces[i]
        x, target = self.packed.get(self.layer, b), self.exact.get(self.layer + 1, b)
        pair = x[part].to(self.device), target[part].to(self.device)
        if self._stay:
            self._here[i] = pair
        return pair


def exact_copy(module: nn.Module) -> nn.Module:
    """The module with the same parameters in memory; replacing a part leaves the other alone."""
    shared = {id(p): p for p in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def learn_block(
    job: Job,
    block: PackedBlock,
    groups: Sequence[RoundedGroup],
    pairs: Pairs,
    learning: Learning,
) -> tuple[list[RoundedGroup], tuple[float, float]]:
    """Learn the groups of a block together; the groups as learned, and the loss before and after.

    Experts keep what GPTQ gave them (their inputs depend on routing, which a step could change).
    """
    runner: BlockRunner = block.runner
    linears: dict[str, LearnedLinear] = {}
    for group in groups:
        if is_expert(group.linears[0]):
            continue
        site = group.site.key
        shared = SharedOperand(
            group.format,
            job.scheme.scale_rule,
            _on(job.channels.get(site) if group.format.branch else None, runner.device),
            _on(job.divisors.get(site), runner.device),
        )
        for linear, rounded in zip(group.linears, group.rounded, strict=True):
            linears[linear.module] = LearnedLinear(rounded, shared, block.bias(linear))
            block.put(linear, linears[linear.module])
    if not linears:
        return list(groups), (0.0, 0.0)
    losses = learn(linears, lambda x: runner.forward(block.module, x), pairs, learning)
    done = [
        RoundedGroup(
            group.site,
            group.format,
            group.linears,
            [
                linears[linear.module].result() if linear.module in linears else rounded
                for linear, rounded in zip(group.linears, group.rounded, strict=True)
            ],
        )
        for group in groups
    ]
    return done, losses


def is_expert(linear: Linear) -> bool:
    """Whether a linear is one of a mixture's experts, which are fused in memory."""
    return ".experts." in linear.module


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
