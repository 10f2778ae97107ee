"""`quantkit calibrate`: measure the activations of a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands import common

EXAMPLES = (
    ("quantkit calibrate model/ --data wikitext", "on the training split of wikitext-2"),
    (
        "quantkit calibrate model/ --data sample --samples 16",
        "on the text that is shipped",
    ),
)


def run(
    checkpoint: common.Checkpoint = None,
    data: Annotated[
        str,
        typer.Option(
            help="wikitext, sample (shipped), a local folder, text, JSONL or parquet file "
            "[:column], a datasets id[:config:split:column], or tokens.safetensors:key."
        ),
    ] = "wikitext",
    samples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 64,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window. Default: 1024, or a token file's rows."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Compute in bfloat16, float16, float32 or auto (as stored).")
    ] = "auto",
    activation_memory: Annotated[
        str, typer.Option(help="Hidden states beyond this go to a file beside the output.")
    ] = "1GB",
    all_experts: Annotated[
        bool, typer.Option(help="Show every expert of a mixture all tokens, not the routed ones.")
    ] = False,
    min_expert_tokens: Annotated[
        int, typer.Option(min=0, help="Experts that saw fewer tokens are listed.")
    ] = 64,
    output: common.Output = None,
    overwrite: common.Overwrite = False,
    restart: common.Restart = False,
    max_shard_size: common.MaxShardSize = "5GB",
    dry_run: common.DryRun = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Measure every linear's input; the output is the same checkpoint with its statistics.

    Under torchrun or accelerate launch the samples are split over the processes.
    """
    common.show(json, quiet)
    target = common.target_of(output, overwrite, restart, max_shard_size)
    memory = common.parse_size(activation_memory)

    from quantkit.calibrate.layerwise import Options, calibrate
    from quantkit.calibrate.summary import summarize

    options = Options(
        data=data,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        activation_memory=memory,
        every_expert=all_experts,
        min_expert_tokens=min_expert_tokens,
    )
    if dry_run:
        from quantkit.calibrate.predict import describe_plan, predict

        plan = predict(checkpoint, options, target)
        console.result(plan, describe_plan(plan), plan["output"])
        return
    result = calibrate(checkpoint, options, target)
    if result is not None:
        data_out, text = summarize(result)
        console.result(data_out, text, str(result.output))
