"""What is refused before it is read: pickles, remote code, paths that leave the folder."""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from pathlib import Path
from typing import IO, Any

import torch

from quantkit.errors import InputRejected

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
OTHER_WEIGHTS = (
    *(".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite"),
    *(".npy", ".npz", ".mlmodel", ".pb", ".engine", ".plan", ".params", ".distcp"),
)
CODE = (".py", ".pyc", ".pyo", ".so", ".sh", ".dll", ".exe", ".js", ".ipynb")
MAX_JSON_BYTES = 32 * 1024 * 1024
# A few bytes of JSON can cost fifty in memory, so containers and values are counted before parsing.
# An index or manifest of 150,000 tensors, the largest models there are, stays far below.
MAX_CONTAINERS, MAX_VALUES = 400_000, 2_000_000
MAX_DEPTH = 64


def strict_json(data: bytes, path: Path) -> Any:
    """Parse JSON from a stranger: UTF-8 only, no duplicate keys, no NaN, bounded depth.

    Raises InputRejected with one line naming `path`.
    """
    if len(data) > MAX_JSON_BYTES:
        raise InputRejected(f"{path}: {len(data)} bytes are too many for a JSON file")
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS or data.count(b",") > MAX_VALUES:
        raise InputRejected(f"{path}: its JSON has too many values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        if _depth_exceeds(value, MAX_DEPTH):
            raise RecursionError
        if b"\\ud" in data or b"\\uD" in data:  # half a surrogate pair could not be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeError:
        raise InputRejected(f"{path}: its JSON is not UTF-8") from None
    except RecursionError:
        raise InputRejected(f"{path}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise InputRejected(f"{path}: bad JSON: {str(error)[:120]}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20:  # more than 64 bits: no count, size or seed
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner = []
        for part in level:
            if isinstance(part, dict):
                inner += [v for v in part.values() if isinstance(v, dict | list)]
            elif isinstance(part, list):
                inner += [v for v in part if isinstance(v, dict | list)]
        if not inner:
            return False
        level = inner
    return True


def read_json(path: Path) -> Any:
    """Parse a JSON file of a checkpoint with the limits of `strict_json`."""
    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    return strict_json(data, path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same key appears twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def open_regular(path: Path) -> IO[bytes]:
    """Open a plain file for reading; a pipe, device or folder in its place is refused."""
    try:
        # Without O_NONBLOCK a named pipe would hang us before it can be told apart.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputRejected(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise InputRejected(f"{path}: cannot be read: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRejected(f"{path}: not a plain file")
    return os.fdopen(descriptor, "rb")


def plain_name(name: object, path: Path) -> str:
    """Return `name` when it is a file name without any path in it; `path` is who names it."""
    bad = not isinstance(name, str) or not name or len(name) > 255 or name in {".", ".."}
    if bad or any(c in str(name) for c in "/\\\0") or not str(name).isprintable():
        raise InputRejected(
            f"{path}: names a file outside the folder: {str(name)[:80]!r}",
            "a checkpoint may only name files that lie beside its index",
        )
    return str(name)


def inside(folder: Path, name: str) -> Path:
    """The real path of a file of `folder`; a symbolic link that leaves the folder is refused.

    In a Hub cache (`models--X/snapshots/REVISION`) links into `models--X/blobs` are how files are
    kept, so those are allowed.
    """
    root = folder.resolve()
    try:
        real = (root / name).resolve()
    except (OSError, RuntimeError, ValueError):
        raise InputRejected(f"{folder / name}: a symbolic link that leads nowhere") from None
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise InputRejected(
            f"{folder / name}: a symbolic link that leaves the folder",
            "copy the file it leads to into the folder",
        )
    return real


def refuse_pickle(folder: Path) -> None:
    """Raise InputRejected with the converting command when `folder` has weights in pickles only."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(PICKLES))
    if names:
        raise InputRejected(
            f"{folder}: only pickled weights ({names[0]}), which can run code when they are read",
            f"convert them without running any: quantkit convert {shlex.quote(str(folder))}",
        )


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise InputRejected when a floating-point tensor holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.itemsize < 2:  # 8-bit floats have no reductions
        tensor = tensor.to(torch.float32)
    # The sum meets every element and is not finite if one of them is not; a finite tensor whose
    # sum overflows is told apart by the slower test.
    if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise InputRejected(
            f"{name}: {count} of {tensor.numel()} values are NaN or infinite",
            "the checkpoint is damaged: fetch or write it again",
        )
