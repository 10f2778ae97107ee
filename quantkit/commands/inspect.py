"""`quantkit inspect`: what a checkpoint is, what was done to it, what its weights cost."""

from __future__ import annotations

from quantkit import console
from quantkit.commands.common import Checkpoint, Json, show

EXAMPLES = (
    ("quantkit inspect model-osc", "steps so far, formats, bits per weight"),
    ("quantkit inspect model --json", "for a program"),
)


def run(checkpoint: Checkpoint = None, json: Json = False) -> None:
    """Show architecture, steps so far, format per site and true bits per weight."""
    from quantkit.checkpoint.inspect import as_text, inspect
    from quantkit.checkpoint.step import open_source

    show(json, quiet=False)
    data = inspect(open_source(checkpoint))
    console.result(data, as_text(data))
