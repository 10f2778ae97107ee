"""`outliers.json`: which channels leave the 4-bit path, as an inspectable file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.safety import inside, read_json
from quantkit.errors import InputRejected

FILE = "outliers.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Separated channels by site key (ascending, absolute) and how they were chosen."""

    sites: Mapping[str, tuple[int, ...]]
    group: int
    criterion: str
    weights_digest: str
    statistics_digest: str | None = None
    density: Mapping[str, float] = field(default_factory=dict)  # clustering density by site key
    threshold: float = 5.0  # T = threshold * mean|x| of the site

    def encode(self) -> bytes:
        """The bytes of `outliers.json`; a site's channels stand on one line."""
        head = {
            "format": FORMAT,
            "criterion": self.criterion,
            "group": self.group,
            "threshold": self.threshold,
            "weights_digest": self.weights_digest,
            "statistics_digest": self.statistics_digest,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(list(channels))}"
            for key, channels in self.sites.items()
        )
        density = dict(self.density)
        lines += [f'"density": {json.dumps(density)},', f'"sites": {{\n{rows}\n}}']
        return ("{\n" + "\n".join(lines) + "\n}\n").encode()


def load_plan(checkpoint: Checkpoint) -> Plan | None:
    """Read the plan of a checkpoint, None without one.

    InputRejected when it is not understood, or was made for other weights.
    """
    path = checkpoint.path / FILE
    if not path.exists() and not path.is_symlink():
        return None
    plan = parse(read_json(inside(checkpoint.path, FILE)), path)
    if plan.weights_digest != checkpoint.weights_digest():
        raise InputRejected(
            f"{path}: the plan was made for other weights",
            f"make it again: quantkit separate-outliers {checkpoint.path}",
        )
    return plan


def parse(data: Any, path: Path) -> Plan:
    """Check the JSON of a plan; InputRejected names the file."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputRejected(f"{path}: not a plan of this version of quantkit")
    sites, density = data.get("sites"), data.get("density", {})
    digest, group = data.get("weights_digest"), data.get("group")
    criterion, threshold = data.get("criterion"), data.get("threshold", 5.0)
    if (
        not isinstance(sites, dict)
        or not isinstance(density, dict)
        or not isinstance(digest, str)
        or type(group) is not int
        or not 0 <= group <= 2**20
        or not isinstance(criterion, str)
        or type(threshold) not in (int, float)
        or not all(isinstance(value, int | float) for value in density.values())
        or not isinstance(data.get("threshold", 5.0), int | float)
        or not all(_ascending(channels) for channels in sites.values())
    ):
        raise InputRejected(f"{path}: not a plan of quantkit")
    statistics = data.get("statistics_digest")
    return Plan(
        {key: tuple(channels) for key, channels in sites.items()},
        group,
        criterion,
        digest,
        statistics if isinstance(statistics, str) else None,
        density,
        float(threshold),
    )


def _ascending(channels: object) -> bool:
    return (
        isinstance(channels, list)
        and all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in channels)
        and all(a < b for a, b in pairwise(channels))
    )
