"""Tensor bytes on their way into shards: appended once, never held, found again after a crash.

A shard's header must precede its data but is known only at the end, so room for it is reserved
(the format lets a header end in spaces). Readers view the bytes of a shard as the tensor's dtype in
place, which needs aligned starts, and the format forbids holes; hence tensors whose size is not a
multiple of 8 bytes wait in a side file and go to the end, widest dtype first.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.checkpoint.header import encode_header, header_entry
from quantkit.checkpoint.journal import Entry, Journal, write_all
from quantkit.checkpoint.reader import CHUNK, read_into

RAGGED = "ragged"
FLUSH_BYTES = 256 * 1024 * 1024
FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class Incoming:
    """A tensor to be stored; `ragged` when it must not go between others."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    pieces: Iterable[memoryview]
    ragged: bool


class Streams:
    """The data files of an unfinished output and the journal that says what they hold."""

    def __init__(self, folder: Path, journal: Journal, header: int, limit: int) -> None:
        self.entries: dict[str, Entry] = {}
        self._folder, self._journal, self._header, self._limit = folder, journal, header, limit
        self._files: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._headers: dict[str, int] = {}  # bytes of JSON each shard needs so far
        self._pending, self._flushed_at = 0, time.monotonic()
        self._replay()

    def _replay(self) -> None:
        """Take over what an interrupted run finished; cut off what it did not."""
        journal = self._journal
        on_disk = len(journal.flushed)
        for i, group in enumerate([*journal.flushed, *journal.unflushed]):
            if not all(map(self._present, group)):
                break
            if i >= on_disk and not all(map(self._intact, group)):
                break  # what follows in the same file cannot be trusted either
            for entry in group:
                self.entries[entry.name] = entry
                self._add_place(entry)
        for path in self._folder.iterdir():
            if path.name not in self._ends:
                path.unlink()
        for name, end in self._ends.items():
            os.ftruncate(self._file(name), end)

    def _present(self, entry: Entry) -> bool:
        path = self._folder / entry.file
        return path.exists() and path.stat().st_size >= entry.end

    def _intact(self, entry: Entry) -> bool:
        digest = hashlib.sha256()
        for piece in self.pieces(entry):
            digest.update(piece)
        return digest.hexdigest() == entry.digest

    def _add_place(self, entry: Entry) -> None:
        self._ends[entry.file] = entry.end
        self._headers[entry.file] = self._headers.get(entry.file, 0) + _header_cost(
            entry.name, entry.dtype, entry.shape
        )

    @property
    def shards(self) -> list[str]:
        """Names of the data files that become shards, in order."""
        return sorted(name for name in self._ends if name != RAGGED)

    def path(self, shard: str) -> Path:
        """Where a data file lies."""
        return self._folder / shard

    def append(self, tensors: Sequence[Incoming]) -> None:
        """Write the bytes of some tensors and record them together: all are done, or none.

        Each goes to the open shard, or to the side file when its size would misalign the next.
        """
        before = dict(self._ends), dict(self._headers)
        try:
            entries = [self._store(tensor) for tensor in tensors]
            self._journal.append(entries)
        except BaseException:
            self._ends, self._headers = before
            raise
        for entry in entries:
            self.entries[entry.name] = entry
        self._pending += sum(entry.end - entry.start for entry in entries)
        if self._pending > FLUSH_BYTES or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def _store(self, tensor: Incoming) -> Entry:
        name, dtype, shape = tensor.name, tensor.dtype, tensor.shape
        file = RAGGED if tensor.ragged else self._open_shard(name, dtype, shape, tensor.nbytes)
        start = self._ends.get(file, 0 if tensor.ragged else self._header)
        descriptor = self._file(file)
        os.lseek(descriptor, start, os.SEEK_SET)
        digest, count = hashlib.sha256(), 0
        for piece in tensor.pieces:
            digest.update(piece)
            write_all(descriptor, piece)
            count += len(piece)
        if count != tensor.nbytes:
            raise ValueError(f"{name}: {count} bytes came instead of {tensor.nbytes}")
        entry = Entry(name, dtype, shape, file, start, start + count, digest.hexdigest())
        self._add_place(entry)
        return entry

    def _open_shard(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int
    ) -> str:
        shards = self.shards
        if shards:
            last = shards[-1]
            used = self._ends[last] - self._header
            room = self._headers[last] + _header_cost(name, dtype, shape) < self._header - 128
            if room and (used == 0 or used + nbytes <= self._limit):
                return last
        return f"shard-{len(shards) + 1:06d}"

    def gather_ragged(self) -> None:
        """Move the tensors of the side file to the end of the shards, widest dtype first."""
        waiting = [entry for entry in self.entries.values() if entry.file == RAGGED]
        for entry in sorted(waiting, key=lambda e: (-e.dtype.itemsize, e.name)):
            size = entry.end - entry.start
            pieces = self.pieces(entry)
            self.append([Incoming(entry.name, entry.dtype, entry.shape, size, pieces, False)])

    def write_headers(self) -> None:
        """Fill in the header of every shard and put everything on the disk."""
        for shard in self.shards:
            mine = [entry for entry in self.entries.values() if entry.file == shard]
            mine.sort(key=lambda entry: (entry.start, entry.end))
            rows = (
                (e.name, e.dtype, e.shape, e.start - self._header, e.end - self._header)
                for e in mine
            )
            descriptor = self._file(shard)
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(descriptor, encode_header(rows, self._header))
        self.flush()

    def pieces(self, entry: Entry) -> Iterable[memoryview]:
        """The bytes of a finished tensor, piece by piece."""
        descriptor = self._file(entry.file)
        buffer = memoryview(bytearray(min(CHUNK, entry.end - entry.start)))
        for position in range(entry.start, entry.end, CHUNK):
            piece = buffer[: min(CHUNK, entry.end - position)]
            read_into(descriptor, position, piece, self.path(entry.file))
            yield piece

    def read(self, name: str, target: memoryview) -> None:
        """Read a finished tensor back into `target`."""
        entry = self.entries[name]
        read_into(self._file(entry.file), entry.start, target, self.path(entry.file))

    def _file(self, name: str) -> int:
        if name not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._files[name] = os.open(self._folder / name, flags, 0o644)
        return self._files[name]

    def flush(self) -> None:
        """Put data, then the record of it, on the disk."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
        self._journal.mark()
        self._pending, self._flushed_at = 0, time.monotonic()

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._journal.close()


def _header_cost(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    # Offsets are not known yet: 14 digits each, a bound for shards below 100 TB.
    return len(name.encode()) * 2 + len(str(header_entry(dtype, shape, 10**13, 10**13))) + 8
