"""`quantkit plan`: formats site by site for a budget of bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import Checkpoint, DryRun, Json, Overwrite, Quiet, Restart, show

EXAMPLES = (
    ("quantkit plan model-calibrated --bits 4.75", "the least loss for 4.75 bits per weight"),
    ("quantkit plan model-calibrated --max-drop 0.2", "the fewest bits that lose 0.2 nats or less"),
    ("quantkit plan model-calibrated --bits 4.6 --formats mxfp4,mxfp8", "in these formats only"),
    ("quantkit plan model-calibrated --bits 4.75 --dry-run", "what would be measured, how long"),
)


def run(
    checkpoint: Checkpoint = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per weight to stay within: scales, branches and indices included.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Excess nats per token to stay within.", show_default=False),
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Number formats to choose from; bf16 allows to spare sites.")
    ] = "mxfp4,nvfp4,mxfp8",
    scale_rule: Annotated[
        str, typer.Option(help="Rule of the block scales: floor, even, ceil, rceil or mse.")
    ] = "even",
    data: Annotated[
        str | None,
        typer.Option(help="Text, as for calibrate. Default: that of the calibration."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Windows on which formats are judged site by site.")
    ] = 4,
    windows: Annotated[
        int, typer.Option(min=1, help="Other windows, on which whole plans are run.")
    ] = 8,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.", show_default="1024")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where the plan goes.", show_default="plan.json"),
    ] = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose format, branch and Hadamard of every site for a budget; `pack --plan` follows it.

    Judges each format at each site against the gradients of the loss, spends the bits where they
    save most, and runs the outcome beside uniform schemes on other text before it writes it.
    """
    from quantkit.plan import tables
    from quantkit.plan.run import Options, plan
    from quantkit.plan.run import dry_run as preview

    show(json, quiet)
    options = Options(
        bits=bits,
        max_drop=max_drop,
        formats=tuple(name.strip() for name in formats.split(",")),
        scale_rule=scale_rule,
        data=data,
        samples=samples,
        windows=windows,
        seq_len=seq_len,
        device=device,
        seed=seed,
    )
    if dry_run:
        found = preview(checkpoint, options)
        console.result(found, tables.dry_run_text(found))
        return
    report = plan(checkpoint, options, output or Path("plan.json"), overwrite, restart)
    console.result(report, tables.as_text(report), report["output"])
