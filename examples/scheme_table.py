"""What compare_schemes.py measured as a table and as a plot of bits against loss."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A scheme over all its calibrations; a peer's result looks the same."""

    name: str
    bits: float
    excess: float  # mean over calibrations, nats per token
    spread: float | None  # standard deviation over calibrations
    stderr: float | None  # of one calibration's excess, from the windows
    perplexity: float | None = None
    calibrations: int = 1
    peer: bool = False


def lines_of(table: Row, order: Sequence[str], peers: Iterable[Row]) -> list[Line]:
    """One line a scheme, in the order given, then the peers."""
    lines = []
    for name in (name for name in order if name in table["schemes"]):
        rows = list(table["schemes"][name].values())
        excess = [row["excess"] for row in rows]
        spread = statistics.stdev(excess) if len(rows) > 1 else None
        bits, loss = (statistics.mean(r[key] for r in rows) for key in ("bits", "perplexity"))
        errors = [row["stderr"] for row in rows if row["stderr"] is not None]
        error = statistics.mean(errors) if errors else None
        lines.append(Line(name, bits, statistics.mean(excess), spread, error, loss, len(rows)))
    known = {"name", "bits", "excess", "stderr"}
    for peer in peers:
        lines.append(Line(**{k: peer[k] for k in known}, spread=None, peer=True))
    return lines


def front(lines: Sequence[Line]) -> list[Line]:
    """The lines that no other is better than at no more bits, by bits."""
    best: list[Line] = []
    for line in sorted(lines, key=lambda one: (one.bits, one.excess)):
        if not best or line.excess < best[-1].excess:
            best.append(line)
    return best


def cells(table: Row, lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The table's text: the original, then every line; a star marks the front."""
    found = [("original", "", "", "", "", "", "")]
    if "original" in table:
        before = table["original"]
        found = [("original", f"{before['bits']:.3f}", f"{before['perplexity']:.2f}", *[""] * 4)]
    best = front(lines)
    for line in lines:
        found.append(
            (
                line.name,
                f"{line.bits:.3f}",
                "" if line.perplexity is None else f"{line.perplexity:.2f}",
                f"{line.excess:+.4f}",
                "" if line.stderr is None else f"{line.stderr:.4f}",
                "" if line.spread is None else f"{line.spread:.4f}",
                "*" if line in best else "",
            )
        )
    return found


HEADER = ("scheme", "bits/weight", "perplexity", "excess", "s.e.", "spread", "front")


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """The table for a README."""
    rule = ("---", *["---:"] * (len(HEADER) - 1))
    return "".join("| " + " | ".join(row) + " |\n" for row in (HEADER, rule, *rows))


def plot(lines: Sequence[Line], file: Path) -> None:
    """Bits against excess loss, logarithmic; the front as a staircase. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {file.name}: pip install matplotlib, then run this again", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=110)
    best = front(lines)
    families = {"mxfp4": "#1b6ca8", "w4a4-plain": "#1b6ca8", "w4a4-mx": "#2a9d5c"}
    families |= {"nvfp4": "#b5651d", "w4a4": "#c1272d", "osc": "#7b4fa3"}
    for line in lines:
        colour = "#777777" if line.peer else families.get(line.name.split(",")[0], "black")
        marker = "x" if line.peer else "s" if line.name.endswith("learned") else "o"
        axes.plot(line.bits, max(line.excess, 1e-4), marker, color=colour, markersize=5)
        if line in best or line.peer:
            at = (line.bits, max(line.excess, 1e-4))
            axes.annotate(line.name, at, (5, 4), textcoords="offset points", fontsize=6)
    corners = [(line.bits, max(line.excess, 1e-4)) for line in best]
    if corners:
        axes.step(*zip(*corners, strict=True), where="post", color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.margins(x=0.25)
    axes.set_xlabel("bits per weight, everything on disk")
    axes.set_ylabel("excess loss, nats per token")
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
