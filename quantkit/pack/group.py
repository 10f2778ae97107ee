"""A fused group (q, k, v; gate, up): what is read for it and what is written, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import InputRejected
from quantkit.model.sites import Linear, Site, read_weight
from quantkit.pack.job import Job
from quantkit.pack.layout import index_tensor, tensors_of
from quantkit.pack.rtn import row_pieces
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import main_and_branch

CPU = torch.device("cpu")


def fused_groups(site: Site) -> Iterator[list[Linear]]:
    """The linears of a site that loaders fuse (q, k, v; gate, up of one expert)."""
    groups: dict[str, list[Linear]] = {}
    for linear in site.linears:
        groups.setdefault(linear.module.rpartition(".")[0], []).append(linear)
    yield from groups.values()


def names_of(fmt: SiteFormat, linear: Linear) -> list[str]:
    """The names of a packed linear's tensors in the checkpoint."""
    return [f"{linear.module}.{name}" for name in tensors_of(fmt, *linear.shape)]


def is_done(writer: CheckpointWriter, fmt: SiteFormat, group: Sequence[Linear]) -> bool:
    """Whether the group was written (it is at once, so one name answers for all)."""
    return writer.done(names_of(fmt, group[0])[0])


def weights_of_group(
    job: Job,
    site: Site,
    fmt: SiteFormat,
    group: Sequence[Linear],
    device: torch.device = CPU,
    stored: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Each linear's weight, separated and rotated, and its branch columns (None without one).

    With a residual branch the columns are the weight's last ones, [out, in + k].
    `stored`: the weights as they were read, when they were. Raises InputRejected for NaN or
    infinity.
    """
    found = []
    for i, linear in enumerate(group):
        read = read_weight(job.weights, linear) if stored is None else stored[i]
        weight = finite(read.to(device), linear)
        weight = weight.float() if fmt.weights == "none" else weight
        channels = None if fmt.branch is None else job.channels[site.key].to(device)
        found.append(main_and_branch(weight, channels, fmt))
    return found


def tensors_of_group(
    job: Job,
    site: Site,
    fmt: SiteFormat,
    group: Sequence[Linear],
    parts: Sequence[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The group's tensors by their names in the checkpoint, NVFP4's input scale included.

    So is the index of a residual branch.
    """
    written: dict[str, Tensor] = {}
    for linear, part in zip(group, parts, strict=True):
        if fmt.branch == "residual":
            part["outlier_index"] = index_tensor(job.channels[site.key], fmt.outliers)
        if fmt.activations == "nvfp4":
            part["input_global_scale"] = job.divisors[site.key]
        written |= {f"{linear.module}.{name}": tensor for name, tensor in part.items()}
    return written


def finite(weight: Tensor, linear: Linear) -> Tensor:
    """Give the weight back; InputRejected when it holds NaN or infinity."""
    for part in row_pieces(weight):
        # A sum meets every element at a fraction of the price of isfinite().all().
        if not torch.isfinite(part.sum(dtype=torch.float32)) and not torch.isfinite(part).all():
            raise InputRejected(f"{linear.module}.weight holds NaN or infinity")
    return weight
