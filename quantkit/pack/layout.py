"""What a packed linear consists of: tensor names below its module, dtypes and shapes.

Names and orientation are those of compressed-tensors; the branch adds `outlier_weight` [out, k]
and `outlier_index` int32 [k]: absolute channels, ascending, padded with -1 (and zero columns).
A residual branch has no weight of its own: the k columns follow the main path's, [out, in + k].
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from quantkit.errors import InputRejected
from quantkit.formats import FORMATS
from quantkit.pack.scheme import SiteFormat

BRANCH_ALIGNMENT = 16  # columns of the branch come in multiples of this, or of a block


def tensors_of(
    fmt: SiteFormat, out: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the packed tensors of a linear [out, width].

    `dtype` is that of weights left unrounded (and of their branch).
    """
    byte, fp8 = torch.uint8, torch.float8_e4m3fn
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    width += fmt.appended
    if fmt.weights == "none":
        found["weight"] = dtype, (out, width)
    elif fmt.weights == "mxfp8":
        found["weight"] = fp8, (out, width)
        found["weight_scale"] = byte, (out, width // 32)
    elif fmt.weights == "mxfp4":
        found["weight_packed"] = byte, (out, width // 2)
        found["weight_scale"] = byte, (out, width // 32)
    elif fmt.weights == "nvfp4":
        found["weight_packed"] = byte, (out, width // 2)
        found["weight_scale"] = fp8, (out, width // 16)
        found["weight_global_scale"] = torch.float32, (1,)
    if fmt.activations == "nvfp4":
        found["input_global_scale"] = torch.float32, (1,)
    if fmt.branch == "bf16":
        branch = dtype if fmt.weights == "none" else torch.bfloat16
        found["outlier_weight"] = branch, (out, fmt.outliers)
    elif fmt.branch == "fp8":
        found["outlier_weight"] = fp8, (out, fmt.outliers)
        found["outlier_weight_scale"] = byte, (out, 1)  # E8M0
    if fmt.branch is not None:
        found["outlier_index"] = torch.int32, (fmt.outliers,)
    return found


def stored_bits(fmt: SiteFormat | None, out: int, width: int) -> int:
    """Bits on disk of a linear [out, width]: scales, branch and index too; 16 a weight unpacked."""
    if fmt is None:
        return 16 * out * width
    parts = tensors_of(fmt, out, width).values()
    return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in parts)


def check_width(
    fmt: SiteFormat,
    width: int,
    where: str,
    hint: str = "leave this kind of site out: --site KIND=bf16",
) -> None:
    """InputRejected when the site's width does not divide into the blocks of its formats."""
    for name in (fmt.weights, fmt.activations):
        block = FORMATS[name].block
        if block and width % block:
            raise InputRejected(
                f"{where}: {width} channels do not divide into {name} blocks of {block}",
                hint,
            )
    if fmt.hadamard_size and width % fmt.hadamard_size:
        raise InputRejected(f"{where}: a Hadamard of {fmt.hadamard_size} does not divide {width}")


def padded(count: int, fmt: SiteFormat | None = None) -> int:
    """Branch columns that hold `count` channels: the next multiple of 16, at least one.

    The columns of a residual branch (`fmt` says so) fill whole blocks of the main path's format.
    """
    size = BRANCH_ALIGNMENT if fmt is None else alignment(fmt)
    return max(-(-count // size), 1) * size


def alignment(fmt: SiteFormat) -> int:
    """What the columns of a site's branch come in multiples of."""
    return (FORMATS[fmt.weights].block if fmt.branch == "residual" else 0) or BRANCH_ALIGNMENT


def index_tensor(channels: Tensor, columns: int) -> Tensor:
    """`outlier_index`: the ascending channels, -1 up to `columns`."""
    index = torch.full((columns,), -1, dtype=torch.int32)
    index[: len(channels)] = channels.to(torch.int32).sort().values
    return index


def check_index(tensors: Mapping[str, Tensor], width: int, where: str) -> None:
    """InputRejected when `outlier_index` (if there is one) is not what `index_tensor` makes.

    Kernels and the reference gather by it: a number past the width would read other memory.
    """
    channels = channels_of(tensors)
    if channels is None:
        return
    index = tensors["outlier_index"]
    ascending = bool((channels.diff() > 0).all()) and bool((index[len(channels) :] == -1).all())
    if not ascending or (len(channels) and int(channels[-1]) >= width):
        raise InputRejected(
            f"{where}: outlier_index does not name channels of {width} in ascending order"
        )


def channels_of(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The separated channels of a packed linear, without the padding: int64; None without."""
    index = tensors.get("outlier_index")
    return None if index is None else index[index >= 0].long()
