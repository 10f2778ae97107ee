"""Split a weight into what stays on the 4-bit path and what the branch multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats.e8m0 import power_of_two, scale_exponent
from quantkit.formats.element import E4M3, round_to_element
from quantkit.pack.layout import index_tensor
from quantkit.pack.scheme import SiteFormat


def separate(w: Tensor, channels: Tensor, fmt: SiteFormat) -> tuple[Tensor, dict[str, Tensor]]:
    """Take `channels` (int64) out of `w` [out, in]: the rest, with zeros there, and the branch.

    The zeros come before any block scale, so a scale is no longer set by a weight that meets a
    zero activation. The branch's tensors are named as in pack/layout.py; its columns are
    rounded to bfloat16 (unless nothing is rounded) or to E4M3 with a power of two per row.
    """
    index = index_tensor(channels, fmt.outliers)
    columns = w.new_zeros(w.shape[0], fmt.outliers)
    columns[:, : len(channels)] = w[:, channels]
    rest = w.index_fill(1, channels, 0)
    found = {"outlier_index": index}
    if fmt.branch == "fp8":
        amax = columns.float().abs().amax(1, keepdim=True)
        scale = power_of_two(scale_exponent(amax, E4M3, "even").clamp(-126, 126))
        rounded = round_to_element(columns.float() / scale, E4M3)
        found["outlier_weight"] = rounded.to(torch.float8_e4m3fn)
        found["outlier_weight_scale"] = scale
    else:
        found["outlier_weight"] = columns if fmt.weights == "none" else columns.bfloat16()
    return rest, found


def rotated(rest: Tensor, fmt: SiteFormat) -> Tensor:
    """The rest of a weight after the site's online Hadamard, in float32; unchanged without one."""
    if not fmt.hadamard_size:
        return rest
    from quantkit.transforms.hadamard import rotate

    return torch.cat([rotate(part.float(), fmt.hadamard_size) for part in rest.split(1024)])
