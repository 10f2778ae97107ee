"""`quantkit separate-outliers`: which channels leave the 4-bit path."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import (
    Checkpoint,
    DryRun,
    Json,
    Output,
    Overwrite,
    Quiet,
    Restart,
    show,
    target_of,
)

EXAMPLES = (
    ("quantkit separate-outliers model-calibrated", "the OSC paper's choice, groups of 32"),
    (
        "quantkit separate-outliers model-calibrated --group 64 --criterion energy",
        "by energy",
    ),
)


def run(
    checkpoint: Checkpoint = None,
    group: Annotated[int, typer.Option(help="At most one channel in so many: 32, 64 or 128.")] = 32,
    criterion: Annotated[
        str,
        typer.Option(
            help="mode: most often the largest above 5 x mean|x| (OSC); magnitude: largest mean "
            "|x|; energy: largest mean x^2; error: largest fall of the block's rounding error."
        ),
    ] = "mode",
    data: Annotated[
        str | None,
        typer.Option(help="For error: the text to measure on. Default: what was calibrated on."),
    ] = None,
    samples: Annotated[int, typer.Option(help="For error: sequences to measure on.")] = 8,
    output: Output = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose the outlier channels of every site and write the plan, outliers.json.

    Prints how strongly outliers cluster in few channels, by kind of site. The weights stay as
    they are; `pack` separates.
    """
    from quantkit.outliers.separate import preview, separate_outliers

    show(json, quiet)
    target = target_of(output, overwrite, restart)
    if dry_run:
        console.result(
            *preview(
                checkpoint,
                target,
                group=group,
                criterion=criterion,
                data=data,
                samples=samples,
            )
        )
        return
    done = separate_outliers(
        checkpoint, target, group=group, criterion=criterion, data=data, samples=samples
    )
    console.result(done.as_json(), done.as_text(), str(done.output))
