"""`quantkit convert`: a pickled checkpoint as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import (
    Json,
    MaxShardSize,
    Output,
    Overwrite,
    Quiet,
    Restart,
    show,
    target_of,
)

EXAMPLES = (("quantkit convert model-pickled", "model-pickled-safetensors/ beside it"),)


def run(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder with pickled weights.")],
    output: Output = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    max_shard_size: MaxShardSize = "5GB",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write pickled weights (pytorch_model.bin) as safetensors; no code of the pickle runs."""
    from quantkit.checkpoint.convert import convert

    show(json, quiet)
    done = convert(folder, target_of(output, overwrite, restart, max_shard_size))
    console.result({"output": str(done)}, f"wrote {done}", str(done))
