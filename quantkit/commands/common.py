"""Options that every step shares, and what they mean.

A step's `run` takes them in this order and hands the five about its output on as a `Target`:

    def run(checkpoint: Checkpoint = None, output: Output = None, overwrite: Overwrite = False,
            restart: Restart = False, max_shard_size: MaxShardSize = "5GB",
            dry_run: DryRun = False, json: Json = False, quiet: Quiet = False) -> None:
        show(json, quiet)
        target = target_of(output, overwrite, restart, max_shard_size)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import console
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.checkpoint.step import Target

Checkpoint = Annotated[
    str | None,
    typer.Argument(
        help="A checkpoint folder or a Hub id (owner/name). Default: the last output.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="Where to write. Default: beside the input.", show_default=False
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output once the new one is whole.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard an interrupted run instead of continuing it.")
]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest file of weights: bytes, or a number with MB, GB, MiB, GiB.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only the output's path.")]

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def show(json: bool, quiet: bool) -> None:
    """Set what the user wants to see."""
    console.OUTPUT.json, console.OUTPUT.quiet = json, quiet


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MiB`, `1000000`; UsageError when it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size", "write it like 5GB or 500MiB")
    return size


def target_of(
    output: Path | None, overwrite: bool, restart: bool, max_shard_size: str = "5GB"
) -> Target:
    """The options about the output in one value."""
    from quantkit.checkpoint.step import Target

    return Target(output, overwrite, restart, parse_size(max_shard_size))
