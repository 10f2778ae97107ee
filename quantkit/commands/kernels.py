"""`quantkit kernels build`: compile kernels ahead of time."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import Json, show

app = typer.Typer(help="GPU kernels: compile them ahead of time.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("build")
def build(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="nvcc target such as sm_90a; repeat for several. Default: this GPU's."),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help="Only WEIGHTS or WEIGHTS,ACTIVATIONS, such as mxfp4,mxfp8; repeatable."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", min=1, help="Compilers at a time.")
    ] = None,
    json: Json = False,
) -> None:
    """Compile every kernel an architecture may need, so that no later run waits for it."""
    from quantkit.kernels.ahead import build

    show(json, quiet=False)
    done = build(arch or [], format or None, jobs)
    console.result(
        done,
        f"{done['kernels']} kernels for {', '.join(done['architectures'])}, {done['compiled']} "
        f"compiled now in {done['seconds']} s, in {done['cache']}",
    )
