"""`quantkit bench`: packed linears against torch's bfloat16 and FP8 on this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import Json, show
from quantkit.errors import UsageError

EXAMPLES = (
    ("quantkit bench --shape 4096,12288 --tokens 1,16", "one linear of an 8B model"),
    ("quantkit bench --format nvfp4 --branch fp8", "NVFP4 with a branch, five shapes"),
)


def run(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="OUTPUTS,WIDTH of a linear; repeatable. Default: five of 8B to 70B."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Token counts, with commas.")] = "1,16,64",
    format: Annotated[
        str, typer.Option(help="WEIGHTS or WEIGHTS,ACTIVATIONS: mxfp4, nvfp4, mxfp8.")
    ] = "mxfp4",
    branch: Annotated[str, typer.Option(help="none, bf16 or fp8.")] = "none",
    group: Annotated[
        int, typer.Option(min=1, help="One channel of each such group is in the branch.")
    ] = 32,
    peers: Annotated[
        str, typer.Option(help="bf16, fp8, humming, with commas, or none.")
    ] = "bf16,fp8",
    repeats: Annotated[int, typer.Option(min=1, help="Replays; the median counts.")] = 15,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the JSON result to a file.")
    ] = None,
    json: Json = False,
) -> None:
    """Time packed linears: GEMM alone and with activation quantization, weights cold in L2."""
    from quantkit.kernels import bench

    show(json, quiet=False)
    weights, _, activations = format.partition(",")
    options = bench.Options(
        shapes=tuple(_pair(text) for text in shape) if shape else bench.SHAPES,
        tokens=_integers(tokens),
        weights=weights,
        activations=activations or weights,
        branch=None if branch == "none" else branch,
        group=group,
        peers=() if peers == "none" else tuple(peers.split(",")),
        repeats=repeats,
    )
    found = bench.run(options)
    if output is not None:
        bench.write(found, output)
    console.result(found, bench.as_text(found))


def _integers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{text!r} is not a list of positive numbers", "write it like 1,16,64")
    return numbers


def _pair(text: str) -> tuple[int, int]:
    numbers = _integers(text)
    if len(numbers) != 2:
        raise UsageError(f"{text!r} is not a shape", "write it like 4096,12288: outputs, width")
    return numbers[0], numbers[1]
