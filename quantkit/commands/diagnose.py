"""`quantkit diagnose`: where rounding loses accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import Checkpoint, Json, Quiet, show

EXAMPLES = (
    ("quantkit diagnose model-calibrated --quick", "site kinds only, in a few minutes"),
    ("quantkit diagnose model-calibrated -o page.html", "with every layer, as a page to look at"),
    ("quantkit diagnose model-rotated --compare model", "block errors beside those of before"),
)


def run(
    checkpoint: Checkpoint = None,
    scheme: Annotated[
        str, typer.Option(help="mxfp4, nvfp4, mxfp8 or osc: what is rounded and spared.")
    ] = "mxfp4",
    scale_rule: Annotated[str, typer.Option(help="floor, even, ceil, rceil or mse.")] = "even",
    data: Annotated[
        str, typer.Option(help="Text: as for calibrate; its test split where it has one.")
    ] = "sample",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.", show_default="1024")
    ] = None,
    noise_windows: Annotated[
        int, typer.Option(min=1, help="Windows for noise curves and block errors.")
    ] = 4,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave single layers out; noise on 2 windows.")
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Another checkpoint of the same model, as before a transform (repeatable). "
            "Default: the untransformed one, when the manifest knows it.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where the page goes.", show_default="diagnosis.html"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Which windows are drawn, and the noise.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run; run nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure where rounding loses accuracy: by site kind, layer, reader and generator.

    Writes one page to look at, and prints the table; `--json` prints every number.
    """
    from quantkit.diagnose import run as stage
    from quantkit.diagnose import tables
    from quantkit.diagnose.page import write_page
    from quantkit.pack.job import PackOptions

    show(json, quiet)
    options = stage.Options(
        scheme=PackOptions(scheme, scale_rule=scale_rule),
        data=data,
        windows=windows,
        seq_len=seq_len,
        noise_windows=min(noise_windows, windows),
        quick=quick,
        compare=tuple(compare or ()),
        device=device,
        seed=seed,
    )
    if dry_run:
        what = stage.dry_run(checkpoint, options)
        console.result(what, tables.dry_run_text(what), None)
        return
    report = stage.diagnose(checkpoint, options)
    page = write_page(report, output or Path("diagnosis.html"))
    report["page"] = str(page)
    console.result(tables.without_rasters(report), tables.as_text(report), str(page))
