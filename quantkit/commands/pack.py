"""`quantkit pack`: a 4-bit checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import (
    Checkpoint,
    DryRun,
    Json,
    MaxShardSize,
    Output,
    Overwrite,
    Quiet,
    Restart,
    show,
    target_of,
)

EXAMPLES = (
    ("quantkit pack model-calibrated", "osc: 4 bits with a 16-bit branch"),
    ("quantkit pack model-calibrated --scheme nvfp4", "plain NVFP4, for other loaders too"),
    ("quantkit pack model-calibrated --mlp-out mxfp4", "down_proj in 4 bits too"),
    ("quantkit pack model-calibrated --scheme mxfp4 --site attn_in=bf16", "spare one kind of site"),
    ("quantkit pack model-calibrated --dry-run", "what would be packed, and into how many bits"),
)


def run(
    checkpoint: Checkpoint = None,
    scheme: Annotated[
        str,
        typer.Option(help="mxfp4, nvfp4, mxfp8, or osc: MXFP4 with a 16-bit branch for outliers."),
    ] = "osc",
    group: Annotated[
        int | None,
        typer.Option(help="One outlier channel in so many: 32, 64 or 128. Default: the plan's."),
    ] = None,
    mlp_out: Annotated[
        str | None,
        typer.Option(
            help="Format of down_proj. osc gives it mxfp8; mxfp4 adds a branch of its own."
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND=FORMAT for attn_in, attn_out, mlp_in or mlp_out; FORMAT+bf16 with a branch, "
            "bf16 alone leaves the kind as it is. Repeatable."
        ),
    ] = None,
    scale_rule: Annotated[
        str, typer.Option(help="Rule of the block scales: floor, even, ceil, rceil or mse.")
    ] = "even",
    branch: Annotated[str, typer.Option(help="Precision of the branch: bf16 or fp8.")] = "bf16",
    rounding: Annotated[str, typer.Option(help="How weights are rounded: rtn.")] = "rtn",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32: separate and transform, but round nothing (for tests)."),
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    max_shard_size: MaxShardSize = "5GB",
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Round a checkpoint to 4 bits; its activations are quantized at run time.

    Needs no statistics for mxfp4 and mxfp8; nvfp4 takes the input scales from them, osc the
    channels to separate (unless separate-outliers made a plan).
    """
    from quantkit.pack.job import PackOptions, parse_sites
    from quantkit.pack.pack import pack
    from quantkit.pack.preview import preview

    show(json, quiet)
    options = PackOptions(
        scheme=scheme,
        group=group,
        scale_rule=scale_rule,
        branch=branch,
        mlp_out=mlp_out,
        sites=parse_sites(site or []),
        dtype=dtype,
        rounding=rounding,
    )
    target = target_of(output, overwrite, restart, max_shard_size)
    if dry_run:
        data, text = preview(checkpoint, options, target)
        console.result(data, text)
        return
    done = pack(checkpoint, options, target)
    console.result(done.as_json(), done.as_text(), str(done.output))
