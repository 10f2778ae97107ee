"""Storage layout to Hopper execution layout, once a layer, when a kernel first needs it.

A checkpoint stores codes and scales row by row. The sm90 kernels read *bricks*: 64 rows by 128
columns in the order in which wgmma's A fragment wants them (`sm90_formats.cuh`), so that one bulk
copy brings what four k-steps of a warpgroup read. Bricks of one 64-row block follow one another,
those of the branch come last: every tile shape reads this one layout. Rows are padded to 64 and
columns to 128 with zeros.

The exact fold: block scales of a row become exponents 0..15 relative to the row's largest, and a
power of two for the row. A row whose block scales span more than 16 octaves does not fit. Its low
blocks go to further *planes*, each of which fits again; the products of the planes are added in
FP32. A plane holds only the rows that need it, and blocks of zeros count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 64  # of a brick
COLUMNS = 128
BRICK_BYTES = ROWS * COLUMNS // 2 + ROWS * COLUMNS // 64  # codes, 4-bit exponents
BRANCH_COLUMNS = {"bf16": 32, "fp8": 64}  # of a branch brick: 64 bytes a row
BRANCH_BRICK_BYTES = ROWS * 64
OCTAVES = 16
_BIAS = 7  # the kernel decodes a code as its value times 2^(exponent - 8)


@dataclass(frozen=True)
class Plane:
    """One exact GEMM: `weights` [row blocks, bricks, BRICK_BYTES] and, for each padded row, `rows`
    float32 [rows, 4] = scale (negative where `far_apart`), bias, branch scale / scale, 0. `index`
    are the output rows it adds to (None: all, in order)."""

    weights: Tensor
    rows: Tensor
    index: Tensor | None


@dataclass(frozen=True)
class Prepared:
    """A packed linear (or several that share their input, stacked) in execution layout."""

    planes: tuple[Plane, ...]
    in_features: int
    out_features: int
    branch: str | None  # "bf16", "fp8" or None
    outlier_index: Tensor | None  # int32 [branch bricks * columns], -1 = none

    @property
    def bricks(self) -> int:
        """128-column bricks along K, the branch not counted."""
        return -(-self.in_features // COLUMNS)

    @property
    def branch_bricks(self) -> int:
        """Bricks of the branch."""
        return self.planes[0].weights.shape[1] - self.bricks

    @property
    def nbytes(self) -> int:
        """Bytes of weights and row constants."""
        return sum(p.weights.nbytes + p.rows.nbytes for p in self.planes)


def prepare_mxfp4(
    weight_packed: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    outlier_scale: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> Prepared:
    """Lay out MXFP4 weights (uint8 [out, in/2], E8M0 [out, in/32]) and their branch.

    The branch is `outlier_weight` bf16 [out, k], or float8_e4m3fn [out, k] with `outlier_scale`
    float32 [out], and `outlier_index` int32 [k]. Linears that share their input are stacked by
    concatenating their rows before the call.
    """
    rows, columns = weight_packed.shape[0], weight_packed.shape[1] * 2
    bytes_ = pad(weight_packed, (0, -weight_packed.shape[1] % (COLUMNS // 2), 0, -rows % ROWS))
    exponent = pad(weight_scale.int(), (0, -weight_scale.shape[1] % 4, 0, -rows % ROWS))
    nonzero = ((bytes_ & 0x77) != 0).unflatten(1, (-1, 16)).any(2)
    invalid = (exponent == 255).any(1)  # E8M0 NaN: the row is NaN

    branch = None
    if outlier_weight is not None and outlier_weight.shape[1]:
        branch = "bf16" if outlier_weight.dtype == torch.bfloat16 else "fp8"
    planes: list[Plane] = []
    index: Tensor | None = None
    todo = nonzero
    while True:
        top = exponent.where(todo, -1).amax(1)
        top = top.where(top >= 0, 127 + _BIAS)  # a row of zeros
        relative = OCTAVES - 1 - (top[:, None] - exponent)
        fits = todo & (relative >= 0)
        scale = _power_of_two(top - 127 - _BIAS).masked_fill(invalid, torch.nan)
        constants = scale.new_zeros(scale.shape[0], 4)
        constants[:, 0] = scale.where(~far_apart(exponent, fits), -scale)
        parts = [_bricks(bytes_, relative.where(fits, 0), fits)]
        if not planes:
            if bias is not None:
                constants[:rows, 1] = bias.float()
            if branch is not None:
                assert outlier_weight is not None
                part, factor = _branch(outlier_weight, outlier_scale, scale)
                parts.append(part)
                constants[:, 2] = factor
        planes.append(Plane(torch.cat(parts, 1).contiguous(), constants, index))
        todo = todo & ~fits
        left = todo.any(1)
        if not bool(left.any()):
            break
        index = left.nonzero()[:, 0] if index is None else index[left.nonzero()[:, 0]]
        keep = left.nonzero()[:, 0]
        extra = -len(keep) % ROWS
        bytes_ = pad(bytes_[keep], (0, 0, 0, extra))
        exponent = pad(exponent[keep], (0, 0, 0, extra))
        todo = pad(todo[keep], (0, 0, 0, extra))
        invalid = pad(invalid[keep], (0, extra))
    gather = None
    if branch is not None:
        assert outlier_index is not None
        gather = pad(
            outlier_index.int(), (0, -len(outlier_index) % BRANCH_COLUMNS[branch]), value=-1
        )
    return Prepared(tuple(planes), columns, rows, branch, gather)


def wide_rows(weight_packed: Tensor, weight_scale: Tensor) -> int:
    """Count rows whose nonzero blocks span more than 16 octaves, so that they need more planes."""
    nonzero = ((weight_packed & 0x77) != 0).unflatten(1, (-1, 16)).any(2)
    exponent = weight_scale.int()
    span = exponent.where(nonzero, -1).amax(1) - exponent.where(nonzero, 999).amin(1)
    return int((span >= OCTAVES).sum())


def far_apart(exponent: Tensor, nonzero: Tensor) -> Tensor:
    """Say of each row whether one FP8 running sum of all its products would lose too much: bool.

    E8M0 exponents [rows, blocks]. It would where more than a sixteenth of the blocks have a scale
    less than 2^-1.5 of the scales' root mean square: their products end below the 14 bits of the
    sum. Weights drawn from one distribution have none; tokens are judged in sm90_activation.cuh.
    """
    top = exponent.where(nonzero, -1).amax(1, keepdim=True)
    relative = (exponent - top).where(nonzero, -torch.inf).float()
    count = nonzero.sum(1)
    mean_square = torch.exp2(2 * relative).sum(1) / count
    low = 2 * relative < torch.log2(mean_square)[:, None] - 3
    return (low & nonzero).sum(1) * 16 > count


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _fragments(bytes_: Tensor) -> Tensor:
    """Bytes [rows, bricks, steps, 32] to wgmma's order [row block, brick, step, thread, 16].

    Threads are (warp, g, t).
    The 16 bytes are A's four registers: row g then g + 8 of K bytes 4t.., the same of 16 + 4t...
    """
    n, bricks, steps, _ = bytes_.shape
    x = bytes_.reshape(n // ROWS, 4, 2, 8, bricks, steps, 2, 4, 4)  # warp hi g brick step half t
    return x.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(n // ROWS, bricks, steps, 128, 16)


def _bricks(bytes_: Tensor, relative: Tensor, fits: Tensor) -> Tensor:
    """Packed codes [n, K/2] and exponents [n, K/32] to bricks [n/64, K/128, BRICK_BYTES]."""
    out = []
    step = max(1, (1 << 25) // bytes_.shape[1] // ROWS) * ROWS  # bound the temporaries
    for start in range(0, bytes_.shape[0], step):
        part = slice(start, start + step)
        out.append(_bricks_of(bytes_[part], relative[part], fits[part]))
    return torch.cat(out)


def _bricks_of(bytes_: Tensor, relative: Tensor, fits: Tensor) -> Tensor:
    n, bricks = bytes_.shape[0], bytes_.shape[1] * 2 // COLUMNS
    kept = bytes_.unflatten(1, (-1, 16)).where(fits[:, :, None], 0)
    half = kept.reshape(n, bricks, 4, 2, 4, 2).int()  # step, half, t, byte: four codes in two bytes
    half = half[..., 0] | half[..., 1] << 8
    low, high = half[:, :, :, 0], half[:, :, :, 1]
    word = (low & 0x7777) | (high & 0x7777) << 16
    for i in range(4):
        sign = low >> (4 * i + 3) & 1
        # torch shifts int32 arithmetically; bit 31 is reached by its negative weight
        word = word | (sign << (8 * i + 7) if i < 3 else -(sign << 30) * 2)
        word = word | (high >> (4 * i + 3) & 1) << (8 * i + 3)
    # [n, bricks, step, t] -> [row block, brick, pair, warp, g, t, step of the pair, hi]
    word = word.reshape(n // ROWS, 4, 2, 8, bricks, 2, 2, 4).permute(0, 4, 5, 1, 3, 7, 6, 2)
    codes = word.contiguous().view(torch.uint8).reshape(n // ROWS, bricks, ROWS * COLUMNS // 2)
    nibbles = relative.reshape(n, bricks, 2, 2)
    pairs = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
    pairs = pairs.reshape(n // ROWS, 4, 2, 8, bricks, 2).permute(0, 4, 1, 3, 2, 5)
    return torch.cat([codes, pairs.reshape(n // ROWS, bricks, -1)], 2)


def _branch(weight: Tensor, own_scale: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Branch weights [out, k] to bricks, and what multiplies their sums beside the row scale."""
    rows = weight.shape[0]
    factor = torch.ones_like(scale)
    if weight.dtype == torch.bfloat16:
        weight = weight / scale[:rows, None]  # exact: the row scale is a power of two
        weight = weight.to(torch.bfloat16)
    else:
        assert own_scale is not None
        factor[:rows] = own_scale.float().reshape(-1) / scale[:rows]
    return pad(branch_bricks(weight), (0, BRICK_BYTES - BRANCH_BRICK_BYTES)), factor


def branch_bricks(weight: Tensor) -> Tensor:
    """Branch weights [out, k], bfloat16 or float8_e4m3fn, to bricks [row blocks, bricks, bytes]."""
    bytes_ = weight.contiguous().view(torch.uint8)
    bytes_ = pad(bytes_, (0, -bytes_.shape[1] % 64, 0, -len(bytes_) % ROWS))
    fragments = _fragments(bytes_.unflatten(1, (-1, 2, 32)))
    return fragments.reshape(len(bytes_) // ROWS, -1, BRANCH_BRICK_BYTES)
