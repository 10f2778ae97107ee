"""The matrices outside the blocks, embedding and output head: rounded to nearest, rows by rows.

They are the largest tensors of a model, so neither they nor their codes are ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit import console
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.model.sites import Linear
from quantkit.pack.group import finite
from quantkit.pack.job import Job
from quantkit.pack.layout import tensors_of
from quantkit.pack.rtn import PIECE, round_nearest
from quantkit.pack.scheme import SiteFormat


def pack_ends(writer: CheckpointWriter, job: Job, device: torch.device) -> None:
    """Write the embedding and the head packed, those of them that have a format.

    Raises InputRejected for NaN or infinity.
    """
    for linear, fmt in job.scheme.ends(job.layout):
        writer.drop(linear.tensor)
        names = {
            f"{linear.module}.{name}": part for name, part in tensors_of(fmt, *linear.shape).items()
        }
        if writer.done(next(iter(names))):
            continue
        writer.write_rows(_parts(job, linear, fmt, device), names)


def _parts(
    job: Job, linear: Linear, fmt: SiteFormat, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    with console.progress(f"pack {linear.module}", len(starts(linear))) as progress:
        for start in starts(linear):
            yield rounded_rows(job, linear, fmt, start, device)
            progress.advance()


def starts(linear: Linear) -> range:
    """The first rows of the pieces that a matrix is rounded in."""
    rows, width = linear.shape
    return range(0, rows, max(PIECE // width, 1))


def rounded_rows(
    job: Job, linear: Linear, fmt: SiteFormat, start: int, device: torch.device
) -> dict[str, Tensor]:
    """The packed tensors of the piece that begins at row `start`, by name, made on `device`."""
    part = slice(start, min(start + starts(linear).step, linear.shape[0]))
    weight = finite(job.weights.read_rows(linear.tensor, part).to(device), linear)
    found = round_nearest(weight, fmt, job.scheme.scale_rule)
    return {f"{linear.module}.{name}": tensor for name, tensor in found.items()}
