"""Split a weight into what stays on the 4-bit path and what the branch multiplies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.e8m0 import encode, power_of_two, scale_exponent
from quantkit.formats.element import E4M3, round_to_element
from quantkit.pack.layout import index_tensor
from quantkit.pack.scheme import SiteFormat


def main_and_branch(
    w: Tensor, channels: Tensor | None, fmt: SiteFormat
) -> tuple[Tensor, Tensor | None]:
    """What the main path rounds of `w` [out, in], and the branch's columns (None without one).

    The main path's part is rotated where the site is; a residual's columns are its last ones.
    """
    if fmt.branch is None:
        return rotated(w, fmt), None
    assert channels is not None
    if fmt.branch == "residual":
        return extended(rotated(w, fmt), channels, fmt), None
    rest, columns = separate(w, channels)
    return rotated(rest, fmt), columns


def separate(w: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Take `channels` (int64) out of `w` [out, in]: the rest, with zeros there, and the columns.

    The zeros come before any block scale, so a scale is no longer set by a weight that meets a
    zero activation.
    """
    return w.index_fill(1, channels, 0), w[:, channels]


def extended(w: Tensor, channels: Tensor, fmt: SiteFormat) -> Tensor:
    """`w` [out, in], rotated, and copies of its `channels` for a residual branch: [out, in + k].

    Columns of zeros fill up the last block.
    """
    return pad(torch.cat([w, w[:, channels]], 1), (0, fmt.appended - len(channels)))


def branch_tensors(columns: Tensor, channels: Tensor, fmt: SiteFormat) -> dict[str, Tensor]:
    """The branch's tensors, named as in pack/layout.py, of the separated columns [out, k].

    Rounded to bfloat16 (unless nothing is rounded) or to E4M3 with a power of two per row.
    """
    padded = columns.new_zeros(columns.shape[0], fmt.outliers)
    padded[:, : len(channels)] = columns
    found = {"outlier_index": index_tensor(channels, fmt.outliers)}
    if fmt.branch == "fp8":
        codes, exponent = _e4m3_rows(padded)
        found["outlier_weight"] = codes.to(torch.float8_e4m3fn)
        found["outlier_weight_scale"] = encode(exponent)
    else:
        found["outlier_weight"] = padded if fmt.weights == "none" else padded.bfloat16()
    return found


def rounded_branch(columns: Tensor, fmt: SiteFormat) -> Tensor:
    """The values `branch_tensors` gives the columns [out, k], in float32."""
    if fmt.branch != "fp8":
        return columns.bfloat16().float()
    codes, exponent = _e4m3_rows(columns)
    return codes * power_of_two(exponent)


def _e4m3_rows(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Elements (float32, E4M3 values) and the exponent of each row [out, 1]."""
    amax = columns.float().abs().amax(1, keepdim=True)
    exponent = scale_exponent(amax, E4M3, "even").clamp(-126, 126)
    return round_to_element(columns.float() / power_of_two(exponent), E4M3), exponent


def rotated(rest: Tensor, fmt: SiteFormat) -> Tensor:
    """The rest of a weight after the site's online Hadamard, in float32; unchanged without one."""
    if not fmt.hadamard_size:
        return rest
    from quantkit.transforms.hadamard import rotate

    return torch.cat([rotate(part.float(), fmt.hadamard_size) for part in rest.split(1024)])
