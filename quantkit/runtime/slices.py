"""A branch under tensor parallelism: the part of it that belongs to one slice of the inputs.

A linear split by inputs gives each rank the channels of one slice. Separated channels are spread
unevenly, so every slice is padded (index -1, zero columns) to the same count: all ranks then run
the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.errors import InputRejected, UsageError
from quantkit.formats import FORMATS
from quantkit.pack.layout import index_tensor, padded
from quantkit.pack.scheme import SiteFormat


def check_slices(fmt: SiteFormat, width: int, slices: int, where: str) -> None:
    """UsageError when `width` channels cannot be cut into so many slices of whole blocks.

    Nor can a residual branch: its columns follow those of the whole input.
    """
    if slices > 1 and fmt.branch == "residual":
        raise UsageError(
            f"{where}: a residual branch does not cut into {slices} slices of the inputs",
            "serve it without tensor parallelism",
        )
    part = width // slices
    blocks = [FORMATS[name].block or 1 for name in (fmt.weights, fmt.activations)]
    for size in (*blocks, fmt.hadamard_size or 1):
        if width % slices or part % size:
            raise UsageError(
                f"{where}: {width} channels do not cut into {slices} slices of whole blocks "
                f"of {size}",
                "serve it with a smaller tensor parallel size",
            )


def largest_count(fmt: SiteFormat, width: int, slices: int) -> int:
    """How many separated channels a slice may hold by the plan's rule, padding included.

    A plan of groups takes at most one channel of each; a free choice may take all in one slice.
    """
    part = width // slices
    if not fmt.group:
        return min(fmt.outliers, padded(part))
    groups = part // fmt.group if part % fmt.group == 0 else part // fmt.group + 2
    return min(fmt.outliers, padded(groups))


def slice_branch(
    tensors: Mapping[str, Tensor], fmt: SiteFormat, width: int, slices: int, rank: int
) -> tuple[dict[str, Tensor], SiteFormat]:
    """The branch's tensors for inputs `rank` of `slices`, and the format that counts them.

    `tensors`: `outlier_weight` [out, k] and `outlier_index` [k] of the whole site (other tensors
    are handed through). Channels in the result count from the slice's first one. Raises
    InputRejected when a slice holds more channels than its plan allows.
    """
    index = tensors["outlier_index"]
    part = width // slices
    channels = index[index >= 0].long()
    owner = channels // part
    counts = torch.bincount(owner, minlength=slices)
    columns = padded(int(counts.max()))
    if columns > largest_count(fmt, width, slices) or len(counts) > slices:
        raise InputRejected(f"a slice holds {int(counts.max())} separated channels, past its plan")
    mine = (owner == rank).nonzero().flatten()
    whole = tensors["outlier_weight"]
    # Bytes are moved: not every dtype has an index_select.
    weight = torch.zeros(len(whole), columns, dtype=whole.dtype, device=whole.device)
    moved = whole.view(_raw(whole)).index_select(1, mine.to(whole.device))
    weight.view(_raw(whole))[:, : len(mine)] = moved
    found = {
        "outlier_weight": weight,
        "outlier_index": index_tensor(channels[mine] - rank * part, columns).to(index.device),
    }
    return dict(tensors) | found, replace(fmt, outliers=columns)


def _raw(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]
