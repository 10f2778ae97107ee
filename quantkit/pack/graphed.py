"""A step of learning as one CUDA graph: hundreds of small kernels, launched as one.

A block of a small model takes longer to launch than to compute. The first step of a block runs as
it is, the second is recorded, and the others replay the record on other numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit import console

Step = Callable[[Tensor, Tensor, Tensor], None]  # input, target, rate (a scalar on their device)


class Graphed:
    """`step` on tensors of one shape; where that cannot be recorded, `step` as it is."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        self._refused = False

    def __call__(self, x: Tensor, target: Tensor, rate: float) -> None:
        """Take one step of length `rate`."""
        rates = torch.full((), rate, device=x.device)
        if x.device.type != "cuda" or self._refused:
            self.step(x, target, rates)
        elif self._held is None:
            self._warm(x, target, rates)
        elif self._held[0].shape != x.shape:  # the last samples of a batch
            self.step(x, target, rates)
        else:
            for held, value in zip(self._held, (x, target, rates), strict=True):
                held.copy_(value)
            if self._graph is None and not self._record():
                self.step(x, target, rates)
                return
            assert self._graph is not None
            self._graph.replay()

    def _warm(self, x: Tensor, target: Tensor, rates: Tensor) -> None:
        """The first step, on a stream of its own: libraries set themselves up before the record."""
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            self.step(x, target, rates)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        self._held = (x.clone(), target.clone(), rates.clone())

    def _record(self) -> bool:
        assert self._held is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step(*self._held)
        except RuntimeError as error:  # such as routing, which asks the device for numbers
            self._refused, self._held = True, None
            console.note(f"steps are launched one kernel at a time: {str(error).splitlines()[0]}")
            return False
        self._graph = graph
        return True
