"""`quantkit rotate`: orthogonal changes of basis that leave the function as it is."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands import common

EXAMPLES = (
    (
        "quantkit rotate model --kind hadamard",
        "residual and heads, folded into weights",
    ),
    ("quantkit rotate model --kind block --block 32", "a Hadamard of 32 before each block's scale"),
)


def run(
    checkpoint: common.Checkpoint = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="block (online, per site), hadamard or random-hadamard (global). Default: what "
            "helps --scheme: block for mxfp4 and osc, hadamard for int4.",
            show_default=False,
        ),
    ] = None,
    block: Annotated[int, typer.Option(help="Block size: 16, 32, 64 or 128.")] = 32,
    sites: Annotated[
        str, typer.Option(help="Kinds of site that get a block Hadamard.")
    ] = "attn_in,attn_out,mlp_in,mlp_out",
    parts: Annotated[
        str, typer.Option(help="Of a global rotation: residual, v/o heads, q/k, down input.")
    ] = "r1,r2,r3,r4",
    scheme: Annotated[str, typer.Option(help="The scheme that will be packed.")] = "mxfp4",
    seed: Annotated[int, typer.Option(help="Of the signs of random-hadamard.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help="Store in float32 or float64. Default: as stored.", show_default=False),
    ] = None,
    output: common.Output = None,
    overwrite: common.Overwrite = False,
    restart: common.Restart = False,
    max_shard_size: common.MaxShardSize = "5GB",
    dry_run: common.DryRun = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Rotate: fold R1 and R2 into the weights, record what runs online for `pack`."""
    common.show(json, quiet)
    target = common.target_of(output, overwrite, restart, max_shard_size)

    from quantkit.transforms import rotate

    options = rotate.RotateOptions(
        kind=kind,
        scheme=scheme,
        block=block,
        sites=tuple(sites.split(",")),
        parts=tuple(parts.split(",")),
        seed=seed,
        dtype=dtype,
    )
    result = rotate.rotate_checkpoint(checkpoint, options, target, dry_run=dry_run)
    console.result(result.to_json(), result.text(), str(result.output))
