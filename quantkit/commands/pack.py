"""`quantkit pack`: a 4-bit checkpoint."""

from __future__ import annotations

from pathlib import Path
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
    ("quantkit pack model-calibrated --head mxfp8 --embedding mxfp8", "nothing large in 16 bits"),
    ("quantkit pack model-calibrated --plan plan.json", "formats site by site, as planned"),
    ("quantkit pack model-calibrated --dry-run", "what would be packed, and into how many bits"),
)


def run(
    checkpoint: Checkpoint = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w4a4: the most accurate with 4 bits everywhere. osc: MXFP4 with a 16-bit branch "
            "for outliers, down_proj in MXFP8 (the paper). Plain: mxfp4, nvfp4, mxfp8.",
            show_default="osc",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A file of `quantkit plan`, in place of a scheme.", show_default=False),
    ] = None,
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
            help="KIND=FORMAT for attn_in, attn_out, mlp_in or mlp_out; FORMAT+bf16 (+fp8, "
            "+residual) with a branch, bf16 alone leaves the kind as it is. Repeatable."
        ),
    ] = None,
    scale_rule: Annotated[
        str, typer.Option(help="Rule of the block scales: floor, even, even4, ceil, rceil or mse.")
    ] = "even",
    branch: Annotated[
        str | None,
        typer.Option(
            help="Precision of the branch: bf16 or fp8. Default: bf16; w4a4: fp8. residual: what "
            "rounding loses of the channels, in 4 bits, as further columns of the same GEMM."
        ),
    ] = None,
    branch_bits: Annotated[
        float | None,
        typer.Option(help="Bits per weight to spend on a branch whose channels are chosen freely."),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="How --branch-bits chooses channels: weighted, output or energy."),
    ] = None,
    hadamard: Annotated[
        int | None,
        typer.Option(help="Rotate blocks of so many channels at run time; 0: no rotation."),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option("--balance/--no-balance", help="Even out channel energies first."),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="rtn, search, gptq or learned (gptq, then trained block by block: for a GPU). "
            "Default: rtn; w4a4: gptq."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of learned rounding, each block. Default: 200.")
    ] = None,
    asymmetric: Annotated[
        bool | None,
        typer.Option(
            "--asymmetric/--symmetric",
            help="gptq and learned: aim at the outputs of the unquantized model, not at those of "
            "the unrounded weight on quantized inputs.",
        ),
    ] = None,
    four_over_six: Annotated[
        bool,
        typer.Option("--four-over-six", help="NVFP4: map block maxima to 6 or to 4."),
    ] = False,
    head: Annotated[
        str | None,
        typer.Option(help="Pack the output head too, as mxfp8 or mxfp4. Default: as it is."),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="Store the embedding as mxfp8 or mxfp4; rows are decoded when looked up. A tied "
            "model takes --head and --embedding together. Default: as it is."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text that gptq and learned round on. Default: that of the calibration."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Windows of that text. Default: the calibration's; gptq: at most 32."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or auto: where gptq and learned compute.")
    ] = "auto",
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
        scheme=scheme or ("osc" if plan is None else "plan"),
        group=group,
        scale_rule=scale_rule,
        branch=branch,
        mlp_out=mlp_out,
        sites=parse_sites(site or []),
        dtype=dtype,
        rounding=rounding,
        branch_bits=branch_bits,
        criterion=criterion,
        hadamard=hadamard,
        balance=balance,
        asymmetric=asymmetric,
        four_over_six=four_over_six,
        steps=steps,
        data=data,
        samples=samples,
        seed=seed,
        device=device,
        plan=None if plan is None else str(plan),
        head=head,
        embedding=embedding,
    )
    target = target_of(output, overwrite, restart, max_shard_size)
    if dry_run:
        console.result(*preview(checkpoint, options, target))
        return
    done = pack(checkpoint, options, target)
    if done is not None:
        console.result(done.as_json(), done.as_text(), str(done.output))
