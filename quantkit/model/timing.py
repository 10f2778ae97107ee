"""How long a model takes on this machine, from one window through one block and the head."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from quantkit.model.block import BlockRunner

# What a packed linear's quantizers add to a block in plain torch (measured on CPUs: 1.5 to 1.7).
ROUNDED = 1.6


@dataclass(frozen=True)
class Pace:
    """Seconds of one window through one block, and through the head."""

    block: float
    head: float

    def whole(self, layers: int) -> float:
        """Seconds of one window through the whole model."""
        return layers * self.block + self.head


def pace(runner: BlockRunner, window: torch.Tensor) -> Pace:
    """Run `window` [1, seq] through the first block and the head, twice, and time the second."""
    runner.keep_head = True
    with torch.no_grad():
        hidden = runner.embed(window)
        block = runner.load(0)
        return Pace(_second(runner, lambda: runner.forward(block, hidden)), _head(runner, hidden))


def _head(runner: BlockRunner, hidden: torch.Tensor) -> float:
    return _second(runner, lambda: runner.head(hidden).float().logsumexp(-1))


def _second(runner: BlockRunner, work: object) -> float:
    assert callable(work)
    for _ in range(2):
        started = time.perf_counter()
        work()
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        seconds = time.perf_counter() - started
    return seconds
