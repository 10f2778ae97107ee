"""`quantkit.json`: what was done to a checkpoint, step by step, and the digests of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.checkpoint.header import DTYPE_NAMES
from quantkit.checkpoint.safety import inside, read_json
from quantkit.errors import InputRejected

FILE = "quantkit.json"
FORMAT = 1


@dataclass(frozen=True)
class Step:
    """One verb that was run: resolved options, what it read, what it cost."""

    verb: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    input_digest: str | None = None
    statistics_digest: str | None = None
    plan_digest: str | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The steps so far (oldest first) and the sha256 of every tensor's bytes."""

    steps: list[Step] = field(default_factory=list)
    weights_digest: str | None = None
    tensors: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The bytes of `quantkit.json`."""
        data = {
            "format": FORMAT,
            "quantkit": __version__,
            "steps": [asdict(step) for step in self.steps],
            "weights_digest": self.weights_digest,
            "tensors": self.tensors,
        }
        return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()

    def last(self, verb: str) -> Step | None:
        """The latest step of `verb`, if it was run."""
        return next((step for step in reversed(self.steps) if step.verb == verb), None)


def online_hadamards(manifest: Manifest | None) -> dict[str, dict[str, int] | None]:
    """The Hadamards that earlier steps recorded for run time and packing materialises.

    A step's `notes["online"]` maps site kinds or site keys to {"block": n} or {"size": n}; a key
    beats its kind, a later step an earlier one, null takes a record back. InputRejected for
    anything else.
    """
    found: dict[str, dict[str, int] | None] = {}
    for step in manifest.steps if manifest else []:
        online = step.notes.get("online", {})
        if not isinstance(online, dict) or not all(map(_is_form, online.values())):
            raise InputRejected(f"{FILE}: the online transforms of {step.verb} are not understood")
        found.update(online)
    return found


def _is_form(form: object) -> bool:
    return form is None or (
        isinstance(form, dict)
        and set(form) in ({"block"}, {"size"})
        and all(type(n) is int and 0 < n < 2**31 for n in form.values())
    )


def read_manifest(folder: Path) -> Manifest | None:
    """Read `quantkit.json` of a checkpoint folder; None without one, InputRejected when bad."""
    path = folder / FILE
    if not path.exists() and not path.is_symlink():
        return None
    data = read_json(inside(folder, FILE))
    if not isinstance(data, dict):
        raise InputRejected(f"{path}: not a quantkit manifest")
    if data.get("format") != FORMAT:
        raise InputRejected(
            f"{path}: manifest format {str(data.get('format'))[:20]!r} is not known here",
            "it was written by another version of quantkit",
        )
    steps, digest, tensors = data.get("steps"), data.get("weights_digest"), data.get("tensors")
    if (
        not isinstance(steps, list)
        or not isinstance(digest, str | None)
        or not isinstance(tensors, dict)
        or not all(isinstance(value, str) for value in tensors.values())
    ):
        raise InputRejected(f"{path}: not a quantkit manifest")
    return Manifest([_step(path, entry) for entry in steps], digest, tensors)


_STEP_TYPES: dict[str, tuple[type, ...]] = {
    "verb": (str,),
    "options": (dict,),
    "seed": (int, type(None)),
    "versions": (dict,),
    "input_digest": (str, type(None)),
    "statistics_digest": (str, type(None)),
    "plan_digest": (str, type(None)),
    "seconds": (int, float),
    "peak_memory_bytes": (int,),
    "notes": (dict,),
}


def _step(path: Path, entry: object) -> Step:
    known = {f.name for f in fields(Step)}
    if not isinstance(entry, dict) or "verb" not in entry or not set(entry) <= known:
        raise InputRejected(f"{path}: a step of the manifest cannot be understood")
    for key, value in entry.items():
        if not isinstance(value, _STEP_TYPES[key]):
            raise InputRejected(f"{path}: {key} of a step has the wrong type")
    return Step(**entry)


def combine_digests(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], str]],
) -> str:
    """The digest of a set of weights: sha256 over names, dtypes, shapes and sha256 of the bytes.

    `tensors`: name -> (dtype, shape, sha256 of its bytes). Neither sharding nor order matters.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, digest = tensors[name]
        total.update(json.dumps([name, DTYPE_NAMES[dtype], list(shape), digest]).encode() + b"\n")
    return total.hexdigest()
