"""Several processes calibrating one model: samples are split, statistics merge over the ranks.

Started by `torchrun` or `accelerate launch`, which set the environment; alone otherwise. Objects
travel over gloo, whatever device computes, between processes of one user's run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from quantkit import console
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = timedelta(hours=2)  # a rank may wait for another's slower block, not for ever
SUMMED = 1 << 26  # values of a sum that travel at a time


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` processes."""

    rank: int = 0
    size: int = 1
    local: int = 0  # number of the process on its machine: which GPU it takes

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: int) -> range:
        """Give this process's run of `items`, nearly equal ones in order."""
        return range(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def broadcast(self, value: Any = None, source: int = 0) -> Any:
        """Give every process the value of one, the first by default."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with self._together():
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the processes, the same bits on every one."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for part in tensor.view(-1).split(SUMMED):
            summed = part.cpu()
            with self._together():
                dist.all_reduce(summed)
            part.copy_(summed)

    def all_gather(self, value: Any) -> list[Any]:
        """Give every process the values of all, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        box: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(box, value)
        return box

    def gather(self, value: Any) -> list[Any]:
        """Give the first process the values of all, by rank; the others get an empty list."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        box: list[Any] | None = [None] * self.size if self.first else None
        with self._together():
            dist.gather_object(value, box, dst=0)
        return box or []

    def barrier(self) -> None:
        """Wait for all."""
        self.all_gather(None)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise QuantkitError(
                f"process {self.rank} of {self.size}: another process of this run has ended",
                "see its message; run the same command again: finished blocks are kept",
            ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes of this run; only the first one speaks."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", rank=ranks.rank, world_size=size, timeout=TIMEOUT)
    if not ranks.first:
        console.OUTPUT.quiet = True
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
