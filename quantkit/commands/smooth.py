"""`quantkit smooth`: exact diagonal scales that move range from activations into weights."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands import common

EXAMPLES = (
    ("quantkit smooth model-calibrated --data sample", "learn the scales of every site"),
    (
        "quantkit smooth model-calibrated --method max",
        "SmoothQuant's rule",
    ),
)


def run(
    checkpoint: common.Checkpoint = None,
    method: Annotated[
        str, typer.Option(help="learned, search (per site), quantile, or max (SmoothQuant).")
    ] = "learned",
    alpha: Annotated[
        float, typer.Option(help="Of max and quantile: share of the range that is moved.")
    ] = 0.5,
    quantile: Annotated[float, typer.Option(help="Of |x| per channel; 1 is the maximum.")] = 0.994,
    sites: Annotated[
        str, typer.Option(help="Kinds of site to smooth.")
    ] = "attn_in,attn_out,mlp_in,mlp_out",
    scheme: Annotated[
        str, typer.Option(help="What will be packed: mxfp4, nvfp4, mxfp8, osc, or int4.")
    ] = "mxfp4",
    scale_rule: Annotated[str, typer.Option(help="Of the MX scales that will be packed.")] = "even",
    hadamard: Annotated[
        str,
        typer.Option(
            help="The online Hadamard that will follow: recorded, none, full, a size. auto: what "
            "is recorded, else what rotate does for the scheme (32 for mxfp4 and osc)."
        ),
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            help="Text that errors are measured on, as for calibrate. Default: what the "
            "checkpoint was calibrated with.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text; a fifth judges only.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.", show_default=False)
    ] = None,
    check: Annotated[
        bool,
        typer.Option(help="Leave a site alone where a rule's scale loses on held-out tokens."),
    ] = True,
    steps: Annotated[int, typer.Option(min=1, help="Of learning, at most.")] = 800,
    learning_rate: Annotated[float, typer.Option(help="Of learning.")] = 0.02,
    batch: Annotated[int, typer.Option(min=1, help="Tokens a learning step.")] = 512,
    seed: Annotated[int, typer.Option(help="Which windows are drawn, and their order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
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
    """Smooth: fold scales into norms, up and v rows, and the weights that read them."""
    common.show(json, quiet)
    target = common.target_of(output, overwrite, restart, max_shard_size)

    from quantkit.transforms import smooth
    from quantkit.transforms.decide import Method
    from quantkit.transforms.learned import Training

    training = Training(steps=steps, learning_rate=learning_rate, batch=batch, seed=seed)
    options = smooth.SmoothOptions(
        method=Method(method, alpha, quantile, check, training),
        sites=tuple(sites.split(",")),
        scheme=scheme,
        scale_rule=scale_rule,
        hadamard=hadamard,
        data=data,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    if dry_run:
        from quantkit.transforms.forecast import preview

        console.result(*preview(checkpoint, options, target))
        return
    result = smooth.smooth(checkpoint, options, target)
    if result is not None:
        console.result(result.to_json(), result.text(), str(result.output))
