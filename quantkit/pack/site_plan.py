"""A site plan: format, separated channels and online Hadamard of every site, as a file.

`quantkit plan` writes one, `quantkit pack --plan` follows it. It belongs to the weights whose
digest it carries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safety import read_json
from quantkit.errors import InputRejected
from quantkit.model.sites import ModelLayout
from quantkit.pack.layout import padded
from quantkit.pack.scheme import RULES, SiteFormat, read_site

FORMAT = 1
KIND = "quantkit-site-plan"


@dataclass(frozen=True)
class SitePlan:
    """Formats by site key (None: left as it is) and the channels of those with a branch."""

    formats: Mapping[str, SiteFormat | None]
    channels: Mapping[str, tuple[int, ...]]  # ascending, absolute
    scale_rule: str
    weights_digest: str
    statistics_digest: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)  # how it came about; nobody acts on it

    def encode(self) -> bytes:
        """The bytes of the file; a site stands on one line."""
        head = {
            "kind": KIND,
            "format": FORMAT,
            "weights_digest": self.weights_digest,
            "statistics_digest": self.statistics_digest,
            "scale_rule": self.scale_rule,
            "notes": dict(self.notes),
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = []
        for key, fmt in self.formats.items():
            site = None if fmt is None else fmt.to_json()
            if site is not None and key in self.channels:
                site["channels"] = list(self.channels[key])
            rows.append(f"  {json.dumps(key)}: {json.dumps(site)}")
        sites = ",\n".join(rows)
        return ("{\n" + "\n".join([*lines, f'"sites": {{\n{sites}\n}}']) + "\n}\n").encode()

    @property
    def digest(self) -> str:
        """The sha256 of what decides the packed bytes: all but the notes."""
        bare = SitePlan(self.formats, self.channels, self.scale_rule, self.weights_digest)
        return sha256(bare.encode()).hexdigest()


def load_site_plan(path: Path, source: Checkpoint, layout: ModelLayout) -> SitePlan:
    """Read the plan at `path` for a checkpoint.

    Raises InputRejected when it is not understood, was made for other weights, or does not name
    exactly the checkpoint's sites.
    """
    if not path.is_file():
        raise InputRejected(f"{path}: no such plan", f"make it: quantkit plan {source.path}")
    plan = _parse(read_json(path), path)
    if plan.weights_digest != source.weights_digest():
        raise InputRejected(
            f"{path}: the plan was made for other weights",
            f"make it again: quantkit plan {source.path}",
        )
    if set(plan.formats) != set(layout.by_key):
        raise InputRejected(f"{path}: does not name the sites of {source.path}")
    for key, channels in plan.channels.items():
        if channels[-1] >= layout.by_key[key].width:
            raise InputRejected(f"{path}: {key} has no channel {channels[-1]}")
    return plan


def _parse(data: Any, path: Path) -> SitePlan:
    broken = InputRejected(f"{path}: not a plan of this version of quantkit")
    if not isinstance(data, dict) or (data.get("kind"), data.get("format")) != (KIND, FORMAT):
        raise broken
    sites, notes, rule = data.get("sites"), data.get("notes"), data.get("scale_rule")
    digests = data.get("weights_digest"), data.get("statistics_digest")
    if (
        not isinstance(sites, dict)
        or not isinstance(notes, dict)
        or rule not in RULES
        or not isinstance(digests[0], str)
        or not isinstance(digests[1], str | None)
    ):
        raise broken
    formats: dict[str, SiteFormat | None] = {}
    channels: dict[str, tuple[int, ...]] = {}
    for key, site in sites.items():
        if site is None:
            formats[key] = None
            continue
        if not isinstance(site, dict):
            raise broken
        chosen = site.get("channels")
        fmt = read_site({k: v for k, v in site.items() if k != "channels"}, str(key))
        if (fmt.branch is None) != (chosen is None):
            raise broken
        if chosen is not None:
            if not _ascending(chosen) or fmt.outliers != padded(len(chosen), fmt):
                raise broken
            channels[key] = tuple(chosen)
        formats[key] = fmt
    return SitePlan(formats, channels, rule, digests[0], digests[1], notes)


def _ascending(channels: object) -> bool:
    return (
        isinstance(channels, list)
        and bool(channels)
        and all(type(c) is int and c >= 0 for c in channels)
        and all(a < b for a, b in pairwise(channels))
    )
