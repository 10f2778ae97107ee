"""Where a run on text puts what it packed: the first process writes, every one computes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from quantkit.calibrate.hidden import HiddenStates, kept_boundary
from quantkit.calibrate.parallel import Ranks
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.model.sites import Linear
from quantkit.pack.group import is_done, names_of
from quantkit.pack.plain import Group
from quantkit.pack.scheme import SiteFormat


@dataclass(frozen=True)
class Shelf:
    """The unfinished output as all processes see it; every method is called by all of them."""

    ranks: Ranks
    writer: CheckpointWriter | None  # the first process's alone
    scratch: Path  # of all

    @classmethod
    def shared(cls, ranks: Ranks, writer: CheckpointWriter | None = None) -> Shelf:
        """Tell every process where the first one writes."""
        folder = ranks.broadcast(None if writer is None else str(writer.scratch))
        return cls(ranks, writer, Path(folder))

    def boundary(self) -> int:
        """The block to begin with: behind the last one whose states were kept."""
        found = kept_boundary(self.scratch) if self.writer is not None else None
        return int(self.ranks.broadcast(found) or 0)

    def undone(self, groups: Sequence[Group]) -> list[int]:
        """The numbers of the groups that are still to be packed."""
        writer, found = self.writer, []
        if writer is not None:
            done = [is_done(writer, fmt, linears) for _, fmt, linears in groups]
            found = [i for i, one in enumerate(done) if not one]
        return list(self.ranks.broadcast(found))

    def read(self, fmt: SiteFormat, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """The tensors of a group that is done."""
        found = None
        if self.writer is not None:
            names = [name for linear in linears for name in names_of(fmt, linear)]
            found = {name: self.writer.read(name) for name in names}
        return self.handed(found, 0)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write a group, once."""
        if self.writer is not None:
            self.writer.write_group(tensors)

    def handed(self, tensors: dict[str, Tensor] | None, owner: int) -> dict[str, Tensor]:
        """The tensors that one process has, for all of them."""
        sent = None
        if self.ranks.rank == owner:
            assert tensors is not None
            if self.ranks.size == 1:
                return tensors
            # As safetensors: 8-bit floats cannot be pickled; names apart, for their order.
            whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
            sent = list(whole), save(whole)
        names, data = self.ranks.broadcast(sent, owner)
        if self.ranks.rank == owner and tensors is not None:
            return tensors
        received = load(data)
        return {name: received[name] for name in names}

    def keep(self, *states: HiddenStates) -> None:
        """Make the states in front of the next block durable, if that is worth its time."""
        # If to one process, then to all: the files of one that spills are half overwritten soon.
        if not any(self.ranks.all_gather(states[0].worth_keeping())):
            return
        if self.writer is not None:
            self.writer.flush()
        for each in reversed(states):
            each.keep()
        self.ranks.barrier()
        if self.writer is not None:
            states[0].mark()
