"""FP4 weights whose Hopper kernel multiplies in bfloat16: storage to execution layout.

A brick is 64 rows by 64 columns (`Fp4InBf16` in `sm90_formats.cuh`): codes in the order of wgmma's
A fragment, then a bfloat16 scale for each row and 16 columns. E2M1 times an E4M3 scale, or times a
power of two, is a bfloat16 number, so the decoded weights are exact; what a row's scales have in
common is a float32 constant of the row. 5 bits a weight. Rows and columns are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.kernels.prepare import ROWS, Plane

COLUMNS = 64
BRICK_BYTES = ROWS * COLUMNS // 2 + ROWS * COLUMNS // 16 * 2


def prepare_fp4(tensors: Mapping[str, Tensor]) -> Plane:
    """Lay out a packed linear: `weight_packed` uint8 [out, in/2] and `weight_scale`.

    NVFP4: scales float8_e4m3fn [out, in/16] and `weight_global_scale` float32 [1], the divisor.
    MXFP4: scales E8M0 uint8 [out, in/32]; blocks more than 126 octaves below the largest of their
    row vanish. `bias` [out] is added where there is one.
    """
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    rows, width = packed.shape[0], packed.shape[1] * 2
    if scale.dtype == torch.float8_e4m3fn:
        common = (1 / tensors["weight_global_scale"].float()).reshape(1).expand(rows)
        scales = scale.to(torch.bfloat16)
    else:
        exponent = scale.int()
        top = exponent.amax(1, keepdim=True)
        common = torch.ldexp(torch.ones_like(top[:, 0], dtype=torch.float32), top[:, 0] - 127)
        common = common.masked_fill(top[:, 0] == 255, torch.nan)
        relative = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - top)
        scales = relative.to(torch.bfloat16).repeat_interleave(2, 1)
    scales = pad(scales, (0, -scales.shape[1] % 4, 0, -rows % ROWS))
    constants = packed.new_zeros(rows + -rows % ROWS, 4, dtype=torch.float32)
    constants[:rows, 0] = common
    if tensors.get("bias") is not None:
        constants[:rows, 1] = tensors["bias"].float()
    bytes_ = pad(packed, (0, -packed.shape[1] % (COLUMNS // 2), 0, -rows % ROWS))
    blocks, bricks = bytes_.shape[0] // ROWS, -(-width // COLUMNS)
    step = max(1, (1 << 25) // bytes_.shape[1] // ROWS)  # bounds the temporaries
    parts = []
    for start in range(0, blocks, step):
        part = slice(start * ROWS, (start + step) * ROWS)
        parts.append(_bricks(bytes_[part], scales[part], bricks))
    return Plane(torch.cat(parts), constants, None)


def _bricks(bytes_: Tensor, scales: Tensor, bricks: int) -> Tensor:
    """Packed codes [n, K/2] and bfloat16 scales [n, K/16] to [n/64, K/64, BRICK_BYTES]."""
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
