"""The one output sink: results on stdout, everything said on the way on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Output:
    """What the user asked to see. Set once by the command line."""

    json: bool = False
    quiet: bool = False


OUTPUT = Output()


def note(message: str) -> None:
    """Say what is happening (stderr; silent under --quiet)."""
    if not OUTPUT.quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say what the user should know even under --quiet (stderr)."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def result(data: dict[str, Any], text: str | None = None, path: str | None = None) -> None:
    """Print a result: one JSON object under --json, only `path` under --quiet, else `text`."""
    if OUTPUT.json:
        print(json.dumps(data, indent=2, default=str), flush=True)
    elif OUTPUT.quiet:
        if path is not None:
            print(path, flush=True)
    elif text is not None:
        print(text, flush=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text columns, numbers to the right; the same on a terminal and in a file."""
    cells = [[str(h) for h in headers], *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    right = [
        bool(rows) and all(_is_number(str(row[i])) for row in rows) for i in range(len(headers))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(cells[0]), rule, *[line(row) for row in cells[1:]]])


def _is_number(text: str) -> bool:
    return text in {"", "-"} or text.lstrip("+-").replace(".", "", 1).rstrip("%").isdigit()


class Progress:
    """Counts finished units; created by `progress`."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._start, self._last = time.monotonic(), 0.0

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Count `units` more as finished."""
        self.done += units
        now = time.monotonic()
        # Plain lines: at most one each five seconds, and always the last one.
        if self.done >= self.total or now - self._last > 5:
            self._last = now
            left = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            tail = f", {detail}" if detail else ""
            note(f"{self.label}: {self.done}/{self.total}, {left:.0f} s left{tail}")


class _BarProgress(Progress):
    def __init__(self, label: str, total: int, bar: Any, task: Any) -> None:
        super().__init__(label, total)
        self._bar, self._task = bar, task

    def advance(self, units: int = 1, detail: str = "") -> None:
        self.done += units
        text = f"{self.label} {detail}".rstrip()
        self._bar.update(self._task, advance=units, description=text)


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """Show progress with the time left: a bar on a terminal, plain lines otherwise."""
    if OUTPUT.quiet or not sys.stderr.isatty():
        yield Progress(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield _BarProgress(label, total, bar, bar.add_task(label, total=total))
