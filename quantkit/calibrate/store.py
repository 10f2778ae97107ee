"""`statistics.safetensors`: what calibration measured, and the weights it belongs to.

Tensors are named `<site key>/<statistic>`:

    count                  tokens seen (int64 scalar); a site that saw none has only this one
    mean m2 m3 m4          mean and central moments E[(x - mean)^p], float64 [channels]
    energy                 sum of x^2, float64 [channels]
    abs_mean absmax        mean and maximum of |x|, float64 and float32 [channels]
    tail                   the k largest |x| of each channel, descending, in the dtype of x
    hits32 hits64 hits128  tokens in which the channel was the maximum of its group and above
                           T = 5 mean|x| of the site, int64 [channels]
    qualify32 ...          tokens in which the group's maximum was above T, int64 [groups]

The metadata is one JSON object: digest of the weights, data, tokens, seed and versions.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantkit.calibrate.schema import check_shapes, check_values, check_widths
from quantkit.checkpoint.header import TensorInfo, header_entry, read_header
from quantkit.checkpoint.reader import CHUNK, Checkpoint, read_into, tensor_bytes
from quantkit.checkpoint.safety import inside, open_regular, strict_json
from quantkit.errors import InputRejected
from quantkit.model.families import describe

FILE = "statistics.safetensors"
FORMAT = 1


@dataclass
class Statistics:
    """Statistics of a checkpoint, read tensor by tensor when asked for."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)

    def get(self, key: str, name: str) -> torch.Tensor:
        """One statistic of a site; InputRejected when it was not measured (see `has`)."""
        info = self.tensors.get(f"{key}/{name}")
        if info is None:
            raise InputRejected(f"{self.path}: no {name} of site {key}", "calibrate again")
        out = torch.empty(info.nbytes, dtype=torch.uint8).view(info.dtype).view(info.shape)
        with open_regular(self.path) as file:
            read_into(file.fileno(), info.start, tensor_bytes(out), self.path)
        check_values(self.path, info.name, out)
        return out

    def has(self, key: str) -> bool:
        """Whether a site saw enough tokens: an expert of a mixture may have seen few or none.

        Whoever works without looks at the weights alone.
        """
        if f"{key}/absmax" not in self.tensors:
            return False
        least = self.meta.get("min_expert_tokens")
        if ".experts." not in key or not isinstance(least, int):
            return True
        return int(self.get(key, "count")) >= least

    def keys(self) -> list[str]:
        """The keys of all sites, in the order of the model."""
        keys = {name.rpartition("/")[0] for name in self.tensors}
        return sorted(keys, key=lambda key: [(p.isdigit() and int(p), p) for p in key.split(".")])

    def quantile(self, key: str, q: float) -> torch.Tensor:
        """The q-quantile of |x| per channel, float32: exact from the tail (nearest rank).

        A `q` below what the tail holds gives the lowest quantile it does hold (`lowest_quantile`).
        """
        tail, count = self.get(key, "tail"), int(self.get(key, "count"))
        above = min(round((1 - q) * (count - 1)), tail.shape[1] - 1)
        return tail[:, above].float()

    def lowest_quantile(self, key: str) -> float:
        """The lowest q for which `quantile` is exact."""
        count = int(self.get(key, "count"))
        return 1 - (self.tensors[f"{key}/tail"].shape[1] - 1) / max(count - 1, 1)

    def kurtosis(self, key: str) -> torch.Tensor:
        """Excess kurtosis over tokens per channel; 0 for a constant channel."""
        m2, m4 = self.get(key, "m2"), self.get(key, "m4")
        return torch.where(m2 > 0, m4 / m2.clamp(min=1e-300) ** 2 - 3, torch.zeros_like(m2))

    def density(self, key: str, group: int) -> torch.Tensor:
        """OSC's clustering density per group: NaN where no token passed the threshold."""
        hits, qualify = self.get(key, f"hits{group}"), self.get(key, f"qualify{group}")
        padded = torch.zeros(len(qualify) * group, dtype=hits.dtype)
        padded[: len(hits)] = hits
        return padded.view(-1, group).amax(1).double() / qualify.double()

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file."""
        digest = hashlib.sha256()
        with open_regular(self.path) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        return digest.hexdigest()


def load_statistics(checkpoint: Checkpoint) -> Statistics:
    """Open the statistics beside a checkpoint's weights.

    Raises InputRejected when there are none, when they are damaged, or when they were measured on
    other weights.
    """
    hint = f"run: quantkit calibrate {checkpoint.path}"
    if not (checkpoint.path / FILE).exists():
        raise InputRejected(f"{checkpoint.path}: no statistics", hint)
    statistics = open_statistics(inside(checkpoint.path, FILE))
    if statistics.meta["weights_digest"] != checkpoint.weights_digest():
        raise InputRejected(f"{statistics.path}: measured on other weights", hint)
    layout = describe(checkpoint.config, checkpoint.tensors)
    check_widths(statistics.path, statistics.tensors, {s.key: s.width for s in layout.sites})
    return statistics


def open_statistics(path: Path) -> Statistics:
    """Open a statistics file without asking which weights it belongs to."""
    tensors = {info.name: info for info in read_header(path)}
    meta = _metadata(path)
    if meta.get("format") != FORMAT or not isinstance(meta.get("weights_digest"), str):
        raise InputRejected(f"{path}: not a statistics file of this version", "calibrate again")
    check_shapes(path, tensors)
    return Statistics(path, meta, tensors)


def _metadata(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = strict_json(file.read(length), path)
    text = header.get("__metadata__", {}).get("quantkit")
    meta = strict_json(text.encode(), path) if isinstance(text, str) else None
    if not isinstance(meta, dict):
        raise InputRejected(f"{path}: not a statistics file", "calibrate again")
    return meta


def combine(parts: Sequence[Path], meta: dict[str, Any]) -> Iterator[bytes | memoryview]:
    """Join the statistics files of all blocks into one, piece by piece.

    The same parts and metadata give the same bytes; wide types come first, so that every tensor
    is aligned.
    """
    found = [(info, path) for path in parts for info in read_header(path)]
    found.sort(key=lambda item: (-item[0].dtype.itemsize, item[0].name))
    entries: dict[str, object] = {
        "__metadata__": {"quantkit": json.dumps({"format": FORMAT, **meta}, sort_keys=True)}
    }
    position = 0
    for info, _ in found:
        end = position + info.nbytes
        entries[info.name] = header_entry(info.dtype, info.shape, position, end)
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for info, path in found:
        with open_regular(path) as file:
            for start in range(info.start, info.end, CHUNK):
                piece = memoryview(bytearray(min(CHUNK, info.end - start)))
                read_into(file.fileno(), start, piece, path)
                yield piece
