"""What an interrupted run has found, in a file beside the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit import console
from quantkit.plan.sensitivity import Costs


def partial(output: Path) -> Path:
    """Where the results of an unfinished run lie."""
    return output.with_name(output.name + ".partial")


class Kept:
    """Costs and runs found so far, in `OUTPUT.partial`; those of another `head` are not used."""

    def __init__(self, output: Path, head: dict[str, Any]) -> None:
        self.path, self.head = partial(output), head
        self.costs: Costs = {}
        self.runs: dict[str, tuple[float, float | None]] = {}  # by digest of the choice
        try:
            found = json.loads(self.path.read_text())
            if found["head"] == self.head:
                self.costs = found["costs"]
                self.runs = {key: (mean, error) for key, (mean, error) in found["runs"].items()}
                console.note(f"continuing {self.path}: {len(self.costs)} sites are judged")
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def keep(self, costs: Costs) -> None:
        """Save the costs found so far and every run."""
        self.costs = costs
        text = json.dumps({"head": self.head, "costs": self.costs, "runs": self.runs})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text(text)
        temporary.replace(self.path)
