"""What an unfinished output already holds: an append-only file that survives any instant.

One JSON object a line. The first line is the fingerprint of the run; each later line is a group of
finished tensors with the places and the sha256 of their bytes, or a mark that everything before it
was flushed to the disk. A torn last line is dropped. Tensors after the last mark are trusted only
when their bytes still have their digest, because after a power cut the journal may be ahead of the
data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.header import DTYPE_NAMES, DTYPES


@dataclass(frozen=True)
class Entry:
    """A finished tensor: bytes [start, end) of a data file of the unfinished output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    end: int
    digest: str

    def encode(self) -> dict[str, Any]:
        """The journal's line."""
        return vars(self) | {"dtype": DTYPE_NAMES[self.dtype], "shape": list(self.shape)}


@dataclass
class Journal:
    """An open journal and what it held: entries known to be on the disk, and later ones."""

    descriptor: int
    head: dict[str, Any]
    flushed: list[list[Entry]]
    unflushed: list[list[Entry]]

    def append(self, entries: Sequence[Entry]) -> None:
        """Record a group of finished tensors in one line.

        It is in the system's hands when this returns, not yet on the disk.
        """
        self.write_line({"done": [entry.encode() for entry in entries]})

    def mark(self) -> None:
        """Say that the data of every line so far is on the disk, and put that on the disk."""
        self.write_line({"flushed": True})
        os.fsync(self.descriptor)

    def write_line(self, line: dict[str, Any]) -> None:
        """Add one line."""
        write_all(self.descriptor, json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the file's position; undone when it fails half-way (disk full)."""
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view[: 2**30]) :]
    except OSError:
        os.ftruncate(descriptor, start)
        os.lseek(descriptor, start, os.SEEK_SET)
        raise


def create(path: Path, head: dict[str, Any]) -> Journal:
    """Start a journal with the fingerprint `head`; it appears whole or not at all."""
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    journal = Journal(descriptor, head, [], [])
    journal.write_line(head)
    os.fsync(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)
    return journal


def resume(path: Path) -> Journal | None:
    """Open the journal of an interrupted run; None when there is none that can be read."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(path, "rb") as file:
        head = _line(file.readline())
        if head is None:
            os.close(descriptor)
            return None
        flushed: list[list[Entry]] = []
        unflushed: list[list[Entry]] = []
        end = file.tell()
        for raw in file:
            line = _line(raw)
            if line is None:
                break
            if line.get("flushed"):
                flushed, unflushed = flushed + unflushed, []
            else:
                unflushed.append([_entry(entry) for entry in line["done"]])
            end += len(raw)
    os.ftruncate(descriptor, end)
    os.lseek(descriptor, end, os.SEEK_SET)
    return Journal(descriptor, head, flushed, unflushed)


def _line(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _entry(line: dict[str, Any]) -> Entry:
    return Entry(**(line | {"dtype": DTYPES[line["dtype"]], "shape": tuple(line["shape"])}))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
