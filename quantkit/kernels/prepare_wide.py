"""Weights whose Hopper kernel multiplies in bfloat16: storage to execution layout.

A brick is 64 rows by 64 columns (`Fp4InBf16`, `Mxfp8InBf16` in `sm90_formats.cuh`): codes in the
order of wgmma's A fragment, then the scales. E2M1 times an E4M3 scale, and E2M1 or E4M3 times a
power of two, are bfloat16 numbers, so the decoded weights are exact; what a row's scales have in
common is a float32 constant of the row. FP4 takes 5 bits a weight (a bfloat16 scale for 16
columns), MXFP8 8.25. Rows and columns are padded with zeros.

The branch keeps its own numbers: its sum is divided by the row constant instead. Its bricks follow
the main ones of a row block, padded to their size where that is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.kernels.prepare import BRANCH_BRICK_BYTES, ROWS, Plane, branch_bricks

COLUMNS = 64


def prepare_fp4(tensors: Mapping[str, Tensor]) -> Plane:
    """Lay out a packed linear: `weight_packed` uint8 [out, in/2] and `weight_scale`.

    NVFP4: scales float8_e4m3fn [out, in/16] and `weight_global_scale` float32 [1], the divisor.
    MXFP4: scales E8M0 uint8 [out, in/32]; blocks more than 126 octaves below the largest of their
    row vanish. `bias` [out] is added where there is one; so is a branch, `outlier_weight` [out, k]
    bfloat16 or float8_e4m3fn with `outlier_weight_scale` float32 [out]. The plane's weights are
    [row blocks, bytes].
    """
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    rows, width = packed.shape[0], packed.shape[1] * 2
    if scale.dtype == torch.float8_e4m3fn:
        common = (1 / tensors["weight_global_scale"].float()).reshape(1).expand(rows)
        scales = scale.to(torch.bfloat16)
    else:
        common, below = _relative(scale)
        relative = torch.ldexp(torch.ones_like(below, dtype=torch.float32), -below)
        scales = relative.to(torch.bfloat16).repeat_interleave(2, 1)
    scales = pad(scales, (0, -scales.shape[1] % 4, 0, -rows % ROWS))
    bytes_ = pad(packed, (0, -packed.shape[1] % (COLUMNS // 2), 0, -rows % ROWS))
    bricks = -(-width // COLUMNS)
    return _plane(tensors, _in_parts(_fp4, bytes_, scales, bricks), common)


def prepare_mxfp8(tensors: Mapping[str, Tensor]) -> Plane:
    """Lay out an MXFP8 linear: `weight` float8_e4m3fn [out, in], `weight_scale` E8M0 [out, in/32].

    Blocks more than 246 octaves below the largest of their row vanish. `bias` and branch are those
    of `prepare_fp4`.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    rows, width = weight.shape
    common, below = _relative(scale)
    nan = (weight.view(torch.uint8) & 0x7F == 0x7F).any(1)  # a float copy takes four times as much
    common = common.masked_fill(nan, torch.nan)
    exponent = (247 - below).clamp(0, 247).to(torch.uint8)  # bfloat16's, of 2^120 times the scale
    exponent = pad(exponent, (0, -exponent.shape[1] % 2, 0, -rows % ROWS))
    codes = pad(weight.view(torch.uint8), (0, -width % COLUMNS, 0, -rows % ROWS))
    bricks = codes.shape[1] // COLUMNS
    return _plane(tensors, _in_parts(_mxfp8, codes, exponent, bricks), common)


def _relative(scale: Tensor) -> tuple[Tensor, Tensor]:
    """E8M0 scales [out, blocks]: the largest of each row as a number, octaves below it.

    That number is at least 2^-63, so that a branch divided by it stays in range.
    """
    exponent = scale.int()
    top = exponent.amax(1, keepdim=True).clamp(min=64)
    common = torch.ldexp(torch.ones_like(top[:, 0], dtype=torch.float32), top[:, 0] - 127)
    return common.masked_fill(top[:, 0] == 255, torch.nan), top - exponent


def _plane(tensors: Mapping[str, Tensor], bricks: Tensor, common: Tensor) -> Plane:
    """Main bricks [row blocks, bricks, bytes] and row constants with bias and branch."""
    rows = len(common)
    constants = common.new_zeros(rows + -rows % ROWS, 4)
    constants[:rows, 0] = common
    if tensors.get("bias") is not None:
        constants[:rows, 1] = tensors["bias"].float()
    parts = [bricks.flatten(1)]
    if "outlier_weight" in tensors:
        branch = branch_bricks(tensors["outlier_weight"])
        parts.append(pad(branch, (0, max(0, bricks.shape[2] - BRANCH_BRICK_BYTES))).flatten(1))
        own = tensors.get("outlier_weight_scale")
        constants[:rows, 2] = (1 if own is None else own.float().reshape(-1)) / common
    return Plane(torch.cat(parts, 1), constants, None)


def _in_parts(
    layout: Callable[[Tensor, Tensor, int], Tensor], bytes_: Tensor, scales: Tensor, bricks: int
) -> Tensor:
    """`layout` of some row blocks at a time, which bounds its temporaries."""
    step = max(1, (1 << 25) // bytes_.shape[1] // ROWS) * ROWS
    starts = range(0, len(bytes_), step)
    return torch.cat([layout(bytes_[s : s + step], scales[s : s + step], bricks) for s in starts])


def _mxfp8(codes: Tensor, exponent: Tensor, bricks: int) -> Tensor:
    """Codes [n, K] and exponents [n, K/32], uint8, to [n/64, K/64, bytes]."""
    n = codes.shape[0]
    # [block, warp, hi, g] rows, [brick, pair, step, half, t, byte] columns
    x = codes.reshape(n // ROWS, 4, 2, 8, bricks, 2, 2, 2, 4, 2)
    x = x.permute(0, 4, 5, 1, 3, 8, 2, 6, 7, 9).reshape(n // ROWS, bricks, -1)
    scales = exponent.reshape(n // ROWS, 4, 2, 8, bricks, 2).permute(0, 4, 1, 3, 2, 5)
    return torch.cat([x, scales.reshape(n // ROWS, bricks, -1)], 2)


def _fp4(bytes_: Tensor, scales: Tensor, bricks: int) -> Tensor:
    """Packed codes [n, K/2] and bfloat16 scales [n, K/16] to [n/64, K/64, bytes]."""
    n = bytes_.shape[0]
    # A byte has columns 2t and 2t + 1: [warp, hi, g] rows, [brick, step, half, t] bytes.
    pairs = bytes_.reshape(n // ROWS, 4, 2, 8, bricks, 4, 2, 4).int()
    # [block, brick, warp, g, t, step, hi, half]: a thread's bytes, the two rows of a word last
    pairs = pairs.permute(0, 4, 1, 3, 7, 5, 2, 6)
    word = torch.zeros_like(pairs[..., 0, 0])
    for hi in range(2):
        for half in range(2):
            byte = pairs[..., hi, half]
            word |= (byte & 0x77) << (16 * hi + 8 * half)
            place = 15 - 4 * (2 * hi + half)  # of the first sign; the second is 16 bits above
            word |= (byte >> 3 & 1) << place
            second = byte >> 7 & 1
            # torch's int32 reaches bit 31 by its negative weight
            word |= -(second << 30) * 2 if place == 15 else second << (place + 16)
    codes = word.contiguous().view(torch.uint8).reshape(n // ROWS, bricks, -1)
    scales = scales.reshape(n // ROWS, 4, 2, 8, bricks, 4).permute(0, 4, 1, 3, 2, 5).contiguous()
    tail = scales.view(torch.uint8).reshape(n // ROWS, bricks, -1)
    return torch.cat([codes, tail], 2)
