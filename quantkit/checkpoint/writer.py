"""Write a checkpoint: streamed shards, hard links to what did not change, whole or not at all.

While unfinished, everything lies in `OUTPUT.partial/`:

    lock        held (flock) while a run writes
    journal     finished tensors; see journal.py
    data/       their bytes; see streams.py
    files/      side files of the step
    scratch/    whatever the step keeps to resume its own computation
    whole/      the output being put together from the above, renamed to OUTPUT at the end

A run killed at any instant leaves this folder; the same run started again continues from it and
ends with the same bytes as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quantkit.checkpoint import journal as journals
from quantkit.checkpoint import manifest as manifests
from quantkit.checkpoint.assemble import carry_files, copy_tree, place
from quantkit.checkpoint.claim import check_output, difference, lock_folder
from quantkit.checkpoint.journal import sync_folder
from quantkit.checkpoint.manifest import Manifest, Step, combine_digests
from quantkit.checkpoint.reader import INDEX, SINGLE, Checkpoint, tensor_bytes
from quantkit.checkpoint.streams import Incoming, Streams
from quantkit.errors import InputRejected, UsageError

DEFAULT_SHARD_SIZE = 5 * 10**9

Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of tensors that come in parts


class CheckpointWriter:
    """The output of one step: every tensor of `source` is kept, dropped or replaced, then finish.

    `fingerprint` says what determines the output (verb, options, input digest, version); an
    interrupted output with another one is refused (UsageError) unless `restart`.
    An existing OUTPUT is refused (UsageError) unless `overwrite`, and then replaced only when the
    new one is whole.
    """

    def __init__(
        self,
        output: Path,
        source: Checkpoint,
        *,
        fingerprint: dict[str, Any],
        overwrite: bool = False,
        restart: bool = False,
        max_shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        self.output, self.source = Path(output), source
        self.partial = self.output.with_name(self.output.name + ".partial")
        self._overwrite, self._restart, self._limit = overwrite, restart, max_shard_size
        # Through JSON once, so that tuples and lists compare equal after a restart.
        self._fingerprint = json.loads(json.dumps(fingerprint, default=str, sort_keys=True))
        self._kept: dict[str, None] = {}
        self._dropped: set[str] = set()
        self._removed_files: set[str] = set()
        self._lock = -1
        self._streams: Streams
        self._published = False

    # -- opening and closing ------------------------------------------------------------------

    def __enter__(self) -> CheckpointWriter:
        check_output(self.output, self.source.path, self._overwrite)
        self._lock = lock_folder(self.partial)
        try:
            self._settle_overwrite()
            self._streams = self._open_streams()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _settle_overwrite(self) -> None:
        """Bring back, or let go, the old output of an overwrite that was killed at its end."""
        replaced = self.partial / "replaced"
        if replaced.exists() and self.output.exists():
            _discard(replaced)  # the new output was already in its place
        elif replaced.exists():
            replaced.rename(self.output)
            check_output(self.output, self.source.path, self._overwrite)

    def _open_streams(self) -> Streams:
        head = {
            "fingerprint": self._fingerprint,
            "max_shard_size": self._limit,
            "header": _header_room(len(self.source.tensors)),
        }
        path = self.partial / "journal"
        journal = None if self._restart else journals.resume(path)
        if journal is not None and journal.head != head:
            journal.close()
            raise UsageError(
                f"{self.partial} was begun by a different run ({difference(journal.head, head)})",
                "repeat that run to continue it, or give --restart to discard it",
            )
        if journal is None:
            for entry in self.partial.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            journal = journals.create(path, head)
        for name in ("data", "files", "scratch"):
            (self.partial / name).mkdir(exist_ok=True)
        return Streams(self.partial / "data", journal, head["header"], self._limit)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.partial)  # a full disk is named by its one line
            if not self._published and not self._useless(error):
                self._streams.flush()
        except OSError:
            if error is None:
                raise
        finally:
            self._streams.close()
            if not self._published and self._useless(error):
                self._clear()
            os.close(self._lock)

    def _useless(self, error: BaseException | None) -> bool:
        """Whether nothing is worth continuing: the input was refused, or nothing was done yet."""
        if (self.partial / "replaced").exists():
            return False  # the only copy of the old output may be in there
        if isinstance(error, InputRejected | UsageError):
            return True
        return self.finished == 0 and not any(self.scratch.iterdir())

    def _clear(self) -> None:
        """Remove the unfinished output."""
        # First the journal: what a kill leaves of the rest must not look like finished work.
        (self.partial / "journal").unlink(missing_ok=True)
        if (self.partial / "replaced").exists():
            _discard(self.partial / "replaced")
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def finished(self) -> int:
        """How many tensors are done."""
        return len(self._streams.entries)

    @property
    def scratch(self) -> Path:
        """A folder for what the step itself needs to resume; gone when the output is whole."""
        return self.partial / "scratch"

    # -- tensors ------------------------------------------------------------------------------

    def keep(self, name: str) -> None:
        """Take a tensor of the source over unchanged."""
        self.source.info(name)
        self._kept[name] = None

    def drop(self, name: str) -> None:
        """Leave a tensor of the source out (its replacement is written under other names)."""
        self.source.info(name)
        self._dropped.add(name)

    def dropped(self, name: str) -> bool:
        """Whether a tensor of the source is left out."""
        return name in self._dropped

    def keep_rest(self) -> None:
        """Keep every tensor of the source that was neither written nor dropped."""
        for name in self.source.tensors:
            if name not in self._dropped and not self.done(name):
                self.keep(name)

    def done(self, name: str) -> bool:
        """Whether `name` was written, by this run or the interrupted one it continues."""
        return name in self._streams.entries

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a new or changed tensor; one that is already done is left as it is."""
        self.write_group({name: tensor})

    def write_group(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors that belong together (a linear's codes and scales): all are done, or none.

        After an interruption `done` of any one of them then answers for the group.
        """
        # Held until they are written: a view of their bytes does not keep them alive.
        data = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if not self.done(n)}
        if data:
            self._streams.append([_incoming(name, tensor) for name, tensor in data.items()])

    def write_rows(self, parts: Iterable[Mapping[str, torch.Tensor]], names: Parts) -> None:
        """Write tensors that belong together from parts, a few rows of each at a time.

        `names`: dtype and shape of every one. The first is never whole in memory; the others, which
        should be small beside it, wait until it is written.
        """
        first, *others = names
        waiting: dict[str, list[torch.Tensor]] = {name: [] for name in others}

        def bytes_of_first() -> Iterator[memoryview]:
            for part in parts:
                for name in others:
                    waiting[name].append(part[name].detach().cpu().contiguous())
                rows = part[first].detach().cpu().contiguous()
                yield tensor_bytes(rows)

        incoming = []
        for name, (dtype, shape) in names.items():
            size = math.prod(shape) * dtype.itemsize
            pieces = map(tensor_bytes, waiting[name]) if name != first else bytes_of_first()
            incoming.append(Incoming(name, dtype, shape, size, pieces, size % 8 != 0))
        self._streams.append(incoming)

    def read(self, name: str) -> torch.Tensor:
        """Read back a tensor that is done."""
        entry = self._streams.entries[name]
        out = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        self._streams.read(name, tensor_bytes(out))
        return out.view(entry.dtype).view(entry.shape)

    def weights_digest(self) -> str:
        """The digest the output's weights will have, once every tensor is kept or written."""
        return combine_digests(self._weights({*self._kept, *self._streams.entries}))

    def flush(self) -> None:
        """Make everything written so far durable (done by itself every few seconds)."""
        self._streams.flush()

    # -- files --------------------------------------------------------------------------------

    def side_file(self, name: str) -> Path:
        """Where a side file of the output lies until the output is whole."""
        return self.partial / "files" / name

    def write_file(self, name: str, data: bytes | Iterable[bytes | memoryview]) -> None:
        """Write a side file (`config.json`, `statistics.safetensors`, ...) of the output."""
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} lies outside the output")
        target = self.side_file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".new")
        with open(temporary, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    def drop_file(self, name: str) -> None:
        """Do not take a side file of the source along."""
        self._removed_files.add(name)

    # -- the end ------------------------------------------------------------------------------

    def finish(self, step: Step) -> Path:
        """Put the output together, write its manifest with `step` added, rename it into place."""
        source, streams = self.source, self._streams
        lost = [
            name
            for name in source.tensors
            if name not in self._kept and name not in self._dropped and not self.done(name)
        ]
        if lost:
            raise RuntimeError(f"{len(lost)} tensors were neither kept nor written: {lost[0]} ...")
        linked = self._unchanged_shards()
        for name, info in source.tensors.items():
            if name in self._kept and info.shard not in linked and not self.done(name):
                ragged, pieces = info.nbytes % 8 != 0, source.chunks(name)
                streams.append(
                    [Incoming(name, info.dtype, info.shape, info.nbytes, pieces, ragged)]
                )
        streams.gather_ragged()
        streams.write_headers()

        whole = self.partial / "whole"
        if whole.exists():
            shutil.rmtree(whole)
        whole.mkdir()
        shards = [source.shards[shard] for shard in linked]
        shards += [streams.path(shard) for shard in streams.shards]
        names = _shard_names(len(shards))
        for real, name in zip(shards, names, strict=True):
            place(real, whole / name)
        weight_map = {
            info.name: names[linked.index(info.shard)]
            for info in source.tensors.values()
            if info.shard in linked
        }
        for entry in streams.entries.values():
            weight_map[entry.name] = names[len(linked) + streams.shards.index(entry.file)]
        weights = self._weights(set(weight_map))
        digest = combine_digests(weights)
        carry_files(
            source.path,
            whole,
            skip=self._removed_files | set(source.shards),
            statistics=not streams.entries and not self._dropped,
        )
        copy_tree(self.partial / "files", whole)
        total = sum(source.tensors[n].nbytes for n in weight_map if n not in streams.entries)
        total += sum(entry.end - entry.start for entry in streams.entries.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: weight_map[name] for name in sorted(weight_map)},
        }
        (whole / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
        before = source.manifest.steps if source.manifest else []
        digests = {name: weights[name][2] for name in sorted(weights)}
        record = Manifest([*before, step], digest, digests)
        (whole / manifests.FILE).write_bytes(record.encode())
        self._publish(whole)
        return self.output

    def _unchanged_shards(self) -> list[str]:
        changed = {
            info.shard
            for info in self.source.tensors.values()
            if info.name not in self._kept or info.name in self._streams.entries
        }
        return [shard for shard in self.source.shards if shard not in changed]

    def _weights(self, names: set[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...], str]]:
        entries = self._streams.entries
        weights = {e.name: (e.dtype, e.shape, e.digest) for e in entries.values()}
        rest = names - set(entries)
        if rest:
            digests = self.source.tensor_digests()
            tensors = self.source.tensors
            weights |= {n: (tensors[n].dtype, tensors[n].shape, digests[n]) for n in rest}
        return weights

    def _publish(self, whole: Path) -> None:
        for folder, _, files in os.walk(whole):
            for name in files:
                descriptor = os.open(Path(folder, name), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            sync_folder(Path(folder))
        replaced = self.partial / "replaced"
        if self.output.exists():
            self.output.rename(replaced)
        try:
            whole.rename(self.output)
        except BaseException:
            if replaced.exists():
                replaced.rename(self.output)
            raise
        self._published = True
        try:
            sync_folder(self.output.parent)
        finally:
            self._clear()


def _incoming(name: str, data: torch.Tensor) -> Incoming:
    view = tensor_bytes(data)
    return Incoming(name, data.dtype, tuple(data.shape), len(view), [view], len(view) % 8 != 0)


def _discard(folder: Path) -> None:
    """Delete a folder under another name, so that half of it is never taken for the whole."""
    trash = folder.with_name("trash")
    if trash.exists():
        shutil.rmtree(trash)
    folder.rename(trash)
    shutil.rmtree(trash)


def _header_room(tensors: int) -> int:
    """Bytes reserved for a shard's header: 1 KiB a source tensor, between 16 KiB and 1 MiB."""
    return min(max(tensors * 1024, 16 * 1024), 1024 * 1024)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
