"""`quantkit export`: a packed checkpoint in the layout of other software."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit import console
from quantkit.commands import common

EXAMPLES = (
    ("quantkit export model-mxfp4", "for compressed-tensors: vLLM and stock transformers"),
    ("quantkit export model-osc --fold-outliers", "without the branch: lossy, and says how much"),
    ("quantkit export model-nvfp4 --to modelopt", "NVFP4 as NVIDIA Model Optimizer writes it"),
    ("quantkit export model-osc --fold-outliers --dry-run", "what would be folded"),
)


def run(
    checkpoint: common.Checkpoint = None,
    to: Annotated[
        str, typer.Option(help="compressed-tensors, or modelopt (NVFP4 only).")
    ] = "compressed-tensors",
    fold_outliers: Annotated[
        bool,
        typer.Option(
            "--fold-outliers",
            help="Put the branch, and Hadamards the target cannot run, back into the weights and "
            "round them again: lossy.",
        ),
    ] = False,
    data: Annotated[
        str, typer.Option(help="Text on which folding is measured: as for eval.")
    ] = "sample",
    windows: Annotated[
        int, typer.Option(min=0, help="Windows of that text; 0: do not measure.")
    ] = 4,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    output: common.Output = None,
    overwrite: common.Overwrite = False,
    restart: common.Restart = False,
    max_shard_size: common.MaxShardSize = "5GB",
    dry_run: common.DryRun = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Rewrite a packed checkpoint the way vLLM, transformers or TensorRT-LLM read it.

    No number changes, and unchanged files are hard links, unless --fold-outliers rounds again.
    """
    from quantkit.export import export as step

    common.show(json, quiet)
    target = common.target_of(output, overwrite, restart, max_shard_size)
    options = step.Options(to, fold_outliers, data, windows, seq_len)
    if dry_run:
        console.result(*step.dry_run(checkpoint, options, target))
        return
    done = step.export(checkpoint, options, target)
    console.result(done.as_json(), done.as_text(), str(done.output))
