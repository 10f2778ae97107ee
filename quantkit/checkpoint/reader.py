"""Read a checkpoint folder tensor by tensor, without ever holding a shard.

Bytes are read with `pread` into memory of the tensor's own, so that what was read and freed does
not stay resident as mapped pages would.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from quantkit.checkpoint import manifest as manifests
from quantkit.checkpoint.header import TensorInfo, read_header
from quantkit.checkpoint.manifest import Manifest
from quantkit.checkpoint.safety import inside, open_regular, plain_name, read_json, refuse_pickle
from quantkit.errors import InputRejected, QuantkitError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 4 * 1024 * 1024
OWN_PAGES = 1024 * 1024  # from this size on, memory is taken from the system by itself


@dataclass
class Checkpoint:
    """A checkpoint folder whose every header was checked; tensors are read on demand."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]  # in shard order
    manifest: Manifest | None
    shards: dict[str, Path]  # file name -> real path, in order
    _files: dict[str, int] = field(default_factory=dict, repr=False)
    _digests: dict[str, str] | None = field(default=None, repr=False)
    _opening: Lock = field(default_factory=Lock, repr=False)

    def names(self) -> list[str]:
        """Tensor names in shard order."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """What tensor `name` is; InputRejected when the checkpoint lacks it."""
        if name not in self.tensors:
            raise InputRejected(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read one tensor into memory of its own, or into `out` (contiguous, e.g. pinned)."""
        info = self.info(name)
        return self._read(info, info.start, info.shape, out)

    def read_rows(self, name: str, rows: int | slice) -> torch.Tensor:
        """Read rows of the first dimension only: an index drops it, a slice (step 1) keeps it."""
        info = self.info(name)
        if not info.shape:
            raise IndexError(f"{name} has no rows")
        length = info.shape[0]
        if isinstance(rows, slice):
            first, last, step = rows.indices(length)
            if step != 1:
                raise IndexError("rows are read with step 1")
            shape: tuple[int, ...] = (max(last - first, 0), *info.shape[1:])
        else:
            if not -length <= rows < length:
                raise IndexError(f"{name} has {length} rows, not {rows}")
            first, shape = rows % length, info.shape[1:]
        row = info.nbytes // length if length else 0
        return self._read(info, info.start + first * row, shape, None)

    def _read(
        self, info: TensorInfo, start: int, shape: tuple[int, ...], out: torch.Tensor | None
    ) -> torch.Tensor:
        if out is None:
            # Allocated as bytes: not every dtype has its own `empty`.
            count = info.dtype.itemsize
            for size in shape:
                count *= size
            out = _own_memory(count).view(info.dtype).view(shape)
        elif out.dtype != info.dtype or tuple(out.shape) != shape or not out.is_contiguous():
            raise ValueError(f"{info.name} does not fit the tensor given")
        read_into(self._file(info.shard), start, tensor_bytes(out), self.shards[info.shard])
        return out

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, piece by piece (each piece is overwritten by the next)."""
        info = self.info(name)
        descriptor, buffer = self._file(info.shard), memoryview(bytearray(min(CHUNK, info.nbytes)))
        for position in range(info.start, info.end, CHUNK):
            piece = buffer[: min(CHUNK, info.end - position)]
            read_into(descriptor, position, piece, self.shards[info.shard])
            yield piece

    def _file(self, shard: str) -> int:
        with self._opening:  # tensors may be read from several threads
            if shard not in self._files:
                with open_regular(self.shards[shard]) as file:
                    self._files[shard] = os.dup(file.fileno())
            return self._files[shard]

    def tensor_digests(self) -> dict[str, str]:
        """The sha256 of every tensor's bytes: from the manifest when it is newer than the shards,
        else computed in one pass over the files."""
        if not self.knows_digests():
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                found = pool.map(self._digest, self.tensors)
                self._digests = dict(zip(self.tensors, found, strict=True))
        assert self._digests is not None
        return self._digests

    def knows_digests(self) -> bool:
        """Whether `tensor_digests` need not read the weights."""
        if self._digests is None:
            self._digests = self._recorded_digests()
        return self._digests is not None

    def _recorded_digests(self) -> dict[str, str] | None:
        if self.manifest is None or set(self.manifest.tensors) != set(self.tensors):
            return None
        written = (self.path / manifests.FILE).stat().st_mtime_ns
        if any(path.stat().st_mtime_ns > written for path in self.shards.values()):
            return None  # a shard was changed after the manifest was written
        return dict(self.manifest.tensors)

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self.chunks(name):
            digest.update(piece)
        return digest.hexdigest()

    def weights_digest(self) -> str:
        """The sha256 over names, dtypes, shapes and bytes; sharding does not matter."""
        digests = self.tensor_digests()
        return manifests.combine_digests(
            {name: (t.dtype, t.shape, digests[name]) for name, t in self.tensors.items()}
        )

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _own_memory(size: int) -> torch.Tensor:
    """Bytes (uint8) that go back to the system when they are freed.

    The C library would keep large pieces for later ones, and what lies between them.
    """
    if size < OWN_PAGES:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes (no copy; keep the tensor alive)."""
    size = tensor.numel() * tensor.itemsize
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def read_into(descriptor: int, start: int, target: memoryview, path: Path) -> None:
    """Fill `target` with the bytes of a file from `start` on; QuantkitError when it ends early."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done : done + 2**30]], start + done)
        if count == 0:
            raise QuantkitError(f"{path}: became shorter while it was read")
        done += count


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a local checkpoint folder: config, index or single file, every shard's header.

    Raises InputRejected when it is missing, truncated, corrupt, pickled, or leaves its folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise InputRejected(f"{folder}: {what}", "give the folder of a checkpoint")
    config_path = folder / "config.json"
    weight_map = _weight_map(folder)
    if not (config_path.exists() or config_path.is_symlink()):
        raise InputRejected(f"{folder}: no config.json", "give the folder of a checkpoint")
    config = read_json(inside(folder, "config.json"))
    if not isinstance(config, dict):
        raise InputRejected(f"{config_path}: not a JSON object")
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    shards = {name: inside(folder, name) for name in names}
    tensors: dict[str, TensorInfo] = {}
    for shard, real in shards.items():
        for info in read_header(real):
            if info.name in tensors:
                raise InputRejected(
                    f"{folder}: tensor {info.name[:80]!r} is in {tensors[info.name].shard} "
                    f"and again in {shard}"
                )
            if weight_map is not None and weight_map.get(info.name) != shard:
                raise InputRejected(
                    f"{folder / shard}: holds tensor {info.name[:80]!r}, "
                    "which the index does not place there"
                )
            tensors[info.name] = TensorInfo(
                info.name, info.dtype, info.shape, shard, info.start, info.end
            )
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise InputRejected(f"{folder / shard}: lacks tensor {name[:80]!r} of the index")
    return Checkpoint(folder, config, tensors, manifests.read_manifest(folder), shards)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of the index; None for a checkpoint of a single file."""
    index = folder / INDEX
    if not (index.exists() or index.is_symlink()):
        if not (folder / SINGLE).exists() and not (folder / SINGLE).is_symlink():
            refuse_pickle(folder)
            raise InputRejected(
                f"{folder}: no {SINGLE} and no {INDEX}", "give the folder of a checkpoint"
            )
        return None
    data = read_json(inside(folder, INDEX))
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRejected(f"{index}: no weight_map")
    for shard in set(map(str, weight_map.values())):
        if not plain_name(shard, index).endswith(".safetensors"):
            raise InputRejected(f"{index}: names {shard[:80]!r}, which is not a safetensors file")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputRejected(f"{index}: a tensor's file is not a name")
    return weight_map
