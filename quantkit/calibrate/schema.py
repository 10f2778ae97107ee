"""What a statistics file may hold: names, dtypes, shapes and ranges, checked before use.

The file may come from a stranger, and a statistic of another width or with a NaN in it would end
as a wrong scale or a crash far from its cause.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.safety import require_finite
from quantkit.errors import InputRejected

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PER_CHANNEL = ("mean", "m2", "m3", "m4", "energy", "abs_mean", "absmax")
_SIGNED = ("mean", "m3")
_HITS = re.compile(r"(hits|qualify)([1-9]\d{0,6})")
HINT = "calibrate again"


def check_shapes(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputRejected unless every tensor is a statistic and all of a site fit together."""
    for full, info in tensors.items():
        key, _, name = full.rpartition("/")
        absmax = tensors.get(f"{key}/absmax")
        width = absmax.shape[0] if absmax is not None and len(absmax.shape) == 1 else None
        if not _fits(name, info, width):
            raise InputRejected(f"{path}: {full[:80]!r} fits no site", HINT)
        if f"{key}/count" not in tensors:
            raise InputRejected(f"{path}: {key[:80]!r} has no count and fits no site", HINT)


def _fits(name: str, info: TensorInfo, width: int | None) -> bool:
    if name == "count":
        return info.dtype is torch.int64 and info.shape == ()
    if width is None or width == 0:
        return False
    if name in _PER_CHANNEL:
        return info.dtype in _FLOATS and info.shape == (width,)
    if name == "tail":
        return (
            info.dtype in _FLOATS
            and info.shape[:1] == (width,) == info.shape[:-1]
            and info.nbytes > 0
        )
    if match := _HITS.fullmatch(name):
        length = width if match[1] == "hits" else -(-width // int(match[2]))
        return info.dtype is torch.int64 and info.shape == (length,)
    return False


def check_values(path: Path, full: str, tensor: torch.Tensor) -> None:
    """Raise InputRejected for NaN, infinity, or a negative count or magnitude."""
    require_finite(f"{path}: {full}", tensor)
    if full.rpartition("/")[2] not in _SIGNED and tensor.numel() and bool((tensor < 0).any()):
        raise InputRejected(f"{path}: {full} has negative values", HINT)


def check_widths(path: Path, tensors: Mapping[str, TensorInfo], widths: Mapping[str, int]) -> None:
    """Raise InputRejected unless every site is the model's (key -> channels), of its width."""
    for full, info in tensors.items():
        key, _, name = full.rpartition("/")
        if key not in widths:
            raise InputRejected(f"{path}: {key[:80]!r} fits no site of the model", HINT)
        if name == "absmax" and info.shape != (widths[key],):
            raise InputRejected(
                f"{path}: {key} fits no site of the model: it has {widths[key]} channels, "
                f"not {info.shape[0]}",
                HINT,
            )
