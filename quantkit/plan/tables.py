"""A plan as text: the curve, and what each kind of site gets."""

from __future__ import annotations

from collections import Counter
from typing import Any

from quantkit import console
from quantkit.model.sites import KINDS


def as_text(report: dict[str, Any]) -> str:
    """Bits against loss of every plan that was run, and the chosen one's formats by kind."""
    return "\n".join(
        [
            _curve(report),
            f"excess nats per token, weights rounded to nearest, on {report['data']}",
            "",
            _formats(report["sites"]),
            f"{report['chosen']}: {report['bits']:.3f} bits per weight; kernel: reference",
            f"wrote {report['output']}",
        ]
    )


def _curve(report: dict[str, Any]) -> str:
    rows = []
    for point in report["pareto"]:
        error = "" if point["stderr"] is None else f" ± {point['stderr']:.4f}"
        marks = ["chosen"] if point["name"] == report["chosen"] else []
        marks += ["unbeaten"] if point["frontier"] else []
        excess = f"{point['excess_nll']:+.4f}{error}"
        bits, expected = f"{point['bits']:.3f}", f"{point['expected']:.4f}"
        rows.append((point["name"], bits, expected, excess, ", ".join(marks)))
    return console.table(("plan", "bits/weight", "expected", "measured", ""), rows)


def _formats(sites: dict[str, str]) -> str:
    rows = []
    for kind in KINDS:
        chosen = Counter(name for key, name in sites.items() if key.rpartition(".")[2] == kind)
        words = "; ".join(f"{name} x{count}" for name, count in chosen.most_common())
        if words:
            rows.append((kind, words))
    return console.table(("site", "formats"), rows)


def dry_run_text(found: dict[str, Any]) -> str:
    """What would be measured."""
    return "\n".join(
        [
            f"{found['checkpoint']}: {found['sites']} sites in {len(found['formats'])} formats, "
            f"then {found['plans']} plans",
            *(f"  {name}" for name in found["formats"]),
            f"text: {found['data']}",
            f"about {found['seconds'] / 60:.0f} minutes and "
            f"{found['peak_memory_bytes'] / 1e9:.2f} GB of memory; kernel: reference",
        ]
    )
