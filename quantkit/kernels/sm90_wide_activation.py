"""Activations of Hopper's products in bfloat16: one kernel, and the same bits by torch operations.

NVFP4 or MXFP8 of `quantkit.formats`, each value times its block scale, in tiles as a bulk copy
brings them in. The kernel (`sm90_wide_activation.cuh`) takes 16-bit inputs on a GPU; `by_torch`
takes any, and gives the same bits where there is no Hadamard (whose sums have an order).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from quantkit.formats import e8m0, nvfp4
from quantkit.formats.element import E4M3
from quantkit.kernels import jit, reference, sm90, sm90_tiles
from quantkit.kernels.prepare_wide import COLUMNS
from quantkit.kernels.rotation import rotated

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MOST_NORMED = 32768  # channels of a token that one CTA normalises


class WideActivationArguments(ctypes.Structure):
    """`WideActivationArguments` of `sm90_wide_activation.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "gain", "keep", "outlier_index", "divisor")),
        *((name, ctypes.c_void_p) for name in ("tokens", "token_scales")),
        ("token_tile_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("m", "k", "tile", "bricks", "branch_columns")),
        *((name, ctypes.c_int) for name in ("branch_fp8", "carry", "hadamard", "gated")),
        ("epsilon", ctypes.c_float),
    )


@dataclass(frozen=True)
class Recipe:
    """How a site's inputs become operands: numbers alone, tensors are passed beside it."""

    activations: str  # nvfp4, mxfp8
    rule: str  # of MXFP8's scales
    hadamard: int  # channels mixed at a time: 0 or 1 mix none
    branch: str | None  # bf16, fp8

    def has_kernel(self, divisor: Tensor | None) -> bool:
        """Whether the kernel knows it: not divisors of the moment, nor searched scales."""
        if self.hadamard > 1 and self.hadamard not in sm90.ROTATIONS:
            return False
        if self.activations == "nvfp4":
            return divisor is not None and divisor.dtype == torch.float32
        return self.rule != "mse"


def by_torch(
    x: Tensor, recipe: Recipe, channels: Tensor | None, columns: int, divisor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [M, K]: token tiles [tiles, bytes], token scales float32 [tokens, 2].

    `channels` go to a branch of `columns` columns.
    """
    factor, own = x.new_ones(2, 1, dtype=torch.float32)
    branch = None
    if channels is not None:
        branch = pad(x.index_select(1, channels), (0, columns - len(channels)))
        x = x.index_fill(1, channels, 0)  # no block scale sees them
        if recipe.branch == "fp8":
            branch, own = reference.fp8_tokens(branch)
            branch, own = branch.to(torch.float8_e4m3fn).view(torch.uint8), own[:, 0]
        else:
            branch = branch.to(torch.bfloat16)
    if recipe.hadamard > 1:
        x = rotated(x, recipe.hadamard)
    if recipe.activations == "nvfp4":
        # Without its divisor a value is exact in bfloat16; with it, in general, it is not.
        values, scale, divisor = nvfp4.elements(x, divisor)
        values = (values * scale[..., None]).flatten(-2)
        factor = 1 / divisor.float().reshape(1)
    else:
        values = reference.quantize_activations(x.float(), recipe.activations, recipe.rule, None)
    tokens = tiles_of(values.to(torch.bfloat16), 128)
    count = len(tokens) * sm90_tiles.token_tile(len(x))  # with padding
    if branch is not None:
        tokens = torch.cat([tokens, tiles_of(branch, 64)], 1)
        own = pad((own / factor).expand(len(x)), (0, count - len(x)))
    return tokens, torch.stack([factor.expand(count), own.expand(count)], 1)


def source_by_torch(x: Tensor, gated: bool, norm: tuple[Tensor, float] | None) -> Tensor:
    """What is quantized of x [M, K] or, gated, [M, 2 K], rounded as the kernel rounds it."""
    if gated:
        gate, up = x.chunk(2, 1)
        return silu(gate) * up
    if norm is None:
        return x
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm[1])
    return norm[0] * wide.to(x.dtype)


def tiles_of(x: Tensor, row_bytes: int) -> Tensor:
    """x [M, K] as token tiles [tiles, bytes]: bricks of 128 or 64 bytes a token, swizzled."""
    size, chunk = sm90_tiles.token_tile(len(x)), 16 // x.element_size()  # of 16 bytes
    columns = row_bytes // 16 * chunk
    x = pad(x, (0, -x.shape[1] % columns, 0, -len(x) % size))
    chunks = x.reshape(len(x) // size, size, x.shape[1] // columns, row_bytes // 16, chunk)
    chunks = chunks.transpose(1, 2)
    row = torch.arange(size, device=x.device)[:, None]
    place = torch.arange(row_bytes // 16, device=x.device)[None]
    place = place ^ row * row_bytes // 128 % (row_bytes // 16)
    return chunks[:, :, row, place].flatten(1).view(torch.uint8)


def compile_for(dtype: torch.dtype, activations: str) -> None:
    """Compile the kernel for inputs in `dtype`, if it takes that."""
    if dtype in DTYPES:
        jit.compile(*_source(dtype, activations))


def _source(dtype: torch.dtype, activations: str) -> tuple[str, str, str]:
    text = sm90_tiles.wide_activation_text(DTYPES[dtype], activations)
    return text, "sm90_wide_activation", sm90.ARCH


@torch.library.custom_op("quantkit::sm90_quantize_wide", mutates_args=())
def quantize_tokens(
    x: Tensor,
    keep: Tensor | None,
    index: Tensor | None,
    divisor: Tensor | None,
    activations: str,
    rule: str,
    fp8: bool,
    hadamard: int,
    gated: bool,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] into token tiles [tiles, bytes] and token scales float32 [tokens, 2].

    `index` are the branch's channels, as many as fill its bricks, -1 for none; `keep` the mask of
    the others; `fp8` says the branch's type. `gated`: x [M, 2 K] holds gate and up, and
    silu(gate) * up is quantized. `gain` [K]: the RMSNorm of x is, as in `sm90.quantize_tokens`.
    Rows of a tile past M are left as they were.
    """
    x, gain = sm90.aligned(x), None if gain is None else sm90.aligned(gain)
    tokens, scales = sm90.allocate(x, index, fp8, gated, COLUMNS)
    if len(x) == 0:
        return tokens, scales
    width = x.shape[1] // 2 if gated else x.shape[1]
    args = WideActivationArguments(
        x=x.data_ptr(),
        gain=None if gain is None else gain.data_ptr(),
        keep=None if keep is None else keep.data_ptr(),
        outlier_index=None if index is None else index.data_ptr(),
        divisor=None if divisor is None else divisor.data_ptr(),
        tokens=tokens.data_ptr(),
        token_scales=scales.data_ptr(),
        token_tile_bytes=tokens.shape[1],
        m=len(x),
        k=width,
        tile=sm90_tiles.token_tile(len(x)),
        bricks=-(-width // COLUMNS),
        branch_columns=0 if index is None else len(index),
        branch_fp8=fp8,
        carry=0 if activations == "nvfp4" else e8m0.carry(E4M3, rule),
        hadamard=hadamard if hadamard > 1 else 0,
        gated=gated,
        epsilon=epsilon,
    )
    source = _source(x.dtype, activations)
    status = jit.load(*source).run(ctypes.byref(args), int(sm90.OVERLAP), sm90._stream(x))
    sm90._check(status, source[1])
    return tokens, scales


@quantize_tokens.register_fake
def _(
    x: Tensor,
    keep: Tensor | None,
    index: Tensor | None,
    divisor: Tensor | None,
    activations: str,
    rule: str,
    fp8: bool,
    hadamard: int,
    gated: bool,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return sm90.allocate(x, index, fp8, gated, COLUMNS)
