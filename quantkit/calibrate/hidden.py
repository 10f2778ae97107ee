"""The hidden states between two blocks, of all samples: in memory, or in a file when they are many.

A boundary (the states in front of block i) is kept durably next to the finished statistics, so
that an interrupted run continues behind the last finished block instead of at the embedding.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from quantkit.checkpoint.journal import sync_folder
from quantkit.checkpoint.reader import read_into, tensor_bytes
from quantkit.errors import QuantkitError

MARK = "boundary.json"


class HiddenStates:
    """States [samples, sequence, hidden] in batches: this process's share of a common file.

    `batches` are the (first, last + 1) samples of all batches; `mine` the numbers of those this
    process computes. The states lie in `folder` as two files of which the one not being written
    is whole; within `memory` bytes they are also held here and written once a block.
    """

    def __init__(
        self,
        folder: Path,
        batches: Sequence[tuple[int, int]],
        mine: Sequence[int],
        shape: tuple[int, int],
        dtype: torch.dtype,
        memory: int,
    ) -> None:
        self.folder, self.batches, self.mine = folder, batches, mine
        self.shape, self.dtype = shape, dtype
        self._sample_bytes = shape[0] * shape[1] * dtype.itemsize
        size = sum(batches[b][1] - batches[b][0] for b in mine) * self._sample_bytes
        self.spilled = size > memory
        self._held: dict[int, torch.Tensor] = {}
        self._files: dict[int, int] = {}
        self._boundary = 0  # of the states last put
        self._kept_at, self._cost = time.monotonic(), 0.0
        self._kept: int | None = None  # the boundary that lies whole on the disk

    def put(self, boundary: int, batch: int, states: torch.Tensor) -> None:
        """Keep a batch of the states in front of block `boundary`."""
        self._boundary = boundary
        if self.spilled:
            self._write(boundary, batch, states.cpu())
        elif states.is_cuda:
            self._copy_out(batch, states)
        else:
            self._held[batch] = states

    def _copy_out(self, batch: int, states: torch.Tensor) -> None:
        """Copy from a GPU without waiting for it, to pinned memory used again every block.

        The stream orders it behind what made the states, and before what next reads them there.
        """
        held = self._held.get(batch)
        if held is None or held.shape != states.shape:
            held = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            self._held[batch] = held
        held.copy_(states, non_blocking=True)

    def get(self, boundary: int, batch: int) -> torch.Tensor:
        """Give a batch of the states in front of block `boundary`."""
        return self._held[batch] if batch in self._held else self._read(boundary, batch)

    def reach(self, boundary: int) -> None:
        """Say that all of `mine` are in front of block `boundary`, also when that is no batch."""
        self._boundary = boundary

    def worth_keeping(self) -> bool:
        """Whether making the states durable now costs less than a tenth of the time it saves.

        Never into the file that holds the boundary kept last: killed meanwhile, there would be
        none. States in files are kept at every block, as the next but one overwrites them.
        """
        if self.spilled:
            return True
        if self._kept is not None and (self._boundary - self._kept) % 2 == 0:
            return False
        return time.monotonic() - self._kept_at >= 10 * self._cost

    def keep(self) -> None:
        """Put this process's states on the disk; `mark` must follow when every process has."""
        start = time.monotonic()
        if any(states.is_pinned() for states in self._held.values()):
            torch.cuda.synchronize()  # copies may still be on their way
        for batch, states in self._held.items():
            self._write(self._boundary, batch, states)
        os.fsync(self._file(self._boundary))
        self._kept, self._kept_at = self._boundary, time.monotonic()
        self._cost = self._kept_at - start

    def mark(self) -> None:
        """Record that the states in front of the current block are whole on the disk."""
        write_durably(self.folder / MARK, json.dumps({"boundary": self._boundary}).encode())

    def load(self, boundary: int) -> None:
        """Take over the states an interrupted run kept in front of block `boundary`."""
        self._boundary = self._kept = boundary
        if not self.spilled:
            self._held = {batch: self._read(boundary, batch) for batch in self.mine}

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _write(self, boundary: int, batch: int, states: torch.Tensor) -> None:
        data = tensor_bytes(states.contiguous())
        at, done = self.batches[batch][0] * self._sample_bytes, 0
        while done < len(data):
            done += os.pwrite(self._file(boundary), data[done : done + 2**30], at + done)

    def _read(self, boundary: int, batch: int) -> torch.Tensor:
        first, last = self.batches[batch]
        states = torch.empty((last - first, *self.shape), dtype=self.dtype)
        at = first * self._sample_bytes
        read_into(self._file(boundary), at, tensor_bytes(states), self._path(boundary))
        return states

    def _path(self, boundary: int) -> Path:
        return self.folder / f"hidden-{boundary % 2}"

    def _file(self, boundary: int) -> int:
        which = boundary % 2
        if which not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._files[which] = os.open(self._path(boundary), flags, 0o644)
        return self._files[which]


def kept_boundary(folder: Path) -> int | None:
    """The block an interrupted run can continue with; None when it kept nothing."""
    try:
        boundary = json.loads((folder / MARK).read_bytes())["boundary"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise QuantkitError(f"{folder / MARK} is damaged", "give --restart to begin anew") from None
    return int(boundary)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the whole new one, at any instant."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
