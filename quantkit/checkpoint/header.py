"""One safetensors file: its header, checked by ourselves before any byte of data is used.

Layout (safetensors format description): 8 bytes little-endian header length, a JSON object
`{name: {"dtype", "shape", "data_offsets"}}` that may be padded with spaces, then the tensor bytes,
contiguous and without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.checkpoint.safety import open_regular, strict_json
from quantkit.errors import InputRejected

# Real headers take about 120 bytes a tensor; this is room for a hundred thousand in one file.
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_NAME = 1024

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is and the bytes [start, end) of its shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start


def read_header(path: Path) -> list[TensorInfo]:
    """List the tensors of the file in the order of their bytes; every claim is checked.

    Raises InputRejected when the file is truncated, or its header is not what the format says.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if len(head) < 8:
            raise _corrupt(path, f"{size} bytes are too few for a safetensors file")
        if head == b"version ":
            raise InputRejected(
                f"{path}: a pointer of Git LFS, not the file itself", "run git lfs pull there"
            )
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER_BYTES:
            raise _corrupt(path, f"it claims a header of {length} bytes")
        if 8 + length > size:
            raise _corrupt(path, f"its header of {length} bytes ends after the file's {size}")
        text = file.read(length)
    entries = strict_json(text, path)
    if not isinstance(entries, dict):
        raise _corrupt(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(path, "its __metadata__ is not an object of strings")
    begin = 8 + length
    tensors = [_tensor(path, name, entry, begin) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = begin
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps another" if tensor.start < position else "leaves a hole before it"
            raise _corrupt(path, f"tensor {_shown(tensor.name)} {what}")
        position = tensor.end
    if position != size:
        what = "truncated" if position > size else "followed by bytes of no tensor"
        raise _corrupt(path, f"its tensors end at byte {position} of {size}: it is {what}")
    return tensors


def _tensor(path: Path, name: str, entry: object, begin: int) -> TensorInfo:
    shown = _shown(name)
    if not name.isprintable() or len(name) > MAX_NAME:  # also: half a surrogate pair
        raise _corrupt(path, f"the tensor name {ascii(name)[:80]} is not a name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"tensor {shown} lacks dtype, shape or data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _corrupt(path, f"tensor {shown} has the unknown dtype {_shown(kind)}")
    if not _sizes(shape) or len(shape) > 32:
        raise _corrupt(path, f"tensor {shown} has an impossible shape")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(path, f"tensor {shown} has impossible data_offsets")
    dtype = DTYPES[kind]
    if dtype is torch.float4_e2m1fn_x2:  # the file counts 4-bit elements, torch pairs of them
        if not shape or shape[-1] % 2:
            raise _corrupt(path, f"tensor {shown} has an odd number of 4-bit columns")
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(max(size, 1) for size in shape) >= 2**62:  # strides of an empty tensor overflow
        raise _corrupt(path, f"tensor {shown} has an impossible shape")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise _corrupt(path, f"tensor {shown}: shape and data_offsets disagree")
    return TensorInfo(name, dtype, tuple(shape), path.name, begin + offsets[0], begin + offsets[1])


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _corrupt(path: Path, why: str) -> InputRejected:
    return InputRejected(f"{path}: {why}", "the file is corrupt: fetch or write it again")


def encode_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], int, int]], length: int
) -> bytes:
    """The first `length` bytes of a file whose data starts there: length field, JSON, spaces.

    `tensors` are (name, dtype, shape, start, end) with positions counted from the end of the
    header. Raises ValueError when they do not fit.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape, start, end in tensors:
        entries[name] = header_entry(dtype, shape, start, end)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length - 8:
        raise ValueError(f"a header of {len(text)} bytes does not fit in {length - 8}")
    return struct.pack("<Q", length - 8) + text.ljust(length - 8)


def header_entry(
    dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int
) -> dict[str, object]:
    """What a header says of one tensor."""
    shown = list(shape)
    if dtype is torch.float4_e2m1fn_x2:
        shown[-1] *= 2
    return {"dtype": DTYPE_NAMES[dtype], "shape": shown, "data_offsets": [start, end]}
