"""Which checkpoints a checkpoint was made from, by its manifest."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import QuantkitError


def origin(checkpoint: Checkpoint) -> Checkpoint | None:
    """The oldest ancestor that is still there with the weights it had then; None without one.

    Every step notes where its input lay, relative to its output. A folder that is gone, or holds
    other weights now (by digest), is passed over for the next younger one.
    """
    steps = checkpoint.manifest.steps if checkpoint.manifest else []
    places: list[tuple[Path, str | None]] = []
    output = checkpoint.path.resolve()
    for step in reversed(steps):
        noted = step.notes.get("input")
        if not isinstance(noted, str) or "\0" in noted:
            break
        output = Path(os.path.normpath(output / noted))
        places.append((output, step.input_digest))
    for folder, digest in reversed(places):
        try:
            found = open_checkpoint(folder)
            if found.weights_digest() == digest:
                return found
        except QuantkitError:
            continue
    return None
