"""NVFP4: blocks of 16 E2M1 values, an E4M3 scale per block, a float32 divisor per tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import e2m1
from quantkit.formats.blocks import to_blocks
from quantkit.formats.element import E2M1, E4M3, round_to_element

BLOCK = 16
SMALLEST_SCALE = 2.0**-9  # E4M3's smallest subnormal: a non-zero block never gets scale zero


def global_scale(amax: Tensor, scale_maximum: float = E4M3.maximum) -> Tensor:
    """The tensor's divisor, float32 [1]: what `amax` is multiplied by to fill the format's range.

    An all-zero (or not finite) tensor gets 1. compressed-tensors stores this number;
    NVIDIA Model Optimizer stores its reciprocal.
    """
    largest = amax.float().reshape(1)
    usable = (largest > 0) & torch.isfinite(largest)
    divisor = torch.full_like(largest, scale_maximum * E2M1.maximum) / largest.where(usable, 1.0)
    usable = usable & torch.isfinite(divisor)
    return divisor.where(usable, 1.0)


def quantize(x: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize [.., K]: packed uint8 [.., K/2], scales float8_e4m3fn [.., K/16], divisor [1].

    `divisor` defaults to the one of this tensor. Raises ValueError when K is not a multiple of
    16. A block with a NaN or an infinity gets the NaN scale.
    """
    blocks = to_blocks(x, BLOCK)
    if divisor is None:
        divisor = global_scale(_largest(x))
    scale = block_scale(blocks.abs().amax(-1), divisor)
    return quantize_with_scales(x, scale, divisor)


def block_scale(amax: Tensor, divisor: Tensor, largest: float = E2M1.maximum) -> Tensor:
    """E4M3 values (float32) of the scales that map block maxima `amax` to `largest`.

    Blocks of zeros get zero.
    """
    # NOTE: by a tensor, because a GPU multiplies by the rounded reciprocal of a plain number.
    scale = round_to_element(divisor * (amax / torch.full_like(amax, largest)), E4M3)
    scale = scale.where((amax == 0) | (scale != 0), SMALLEST_SCALE)
    return scale.where(amax.isfinite(), torch.nan)


def quantize_with_scales(
    x: Tensor, scale: Tensor, divisor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize [.., K] under given block scales [.., K/16] (E4M3 values) and divisor."""
    codes = e2m1.encode(_scaled(to_blocks(x, BLOCK), scale, divisor)).flatten(-2)
    return e2m1.pack(codes), scale.to(torch.float8_e4m3fn), divisor


def _scaled(blocks: Tensor, scale: Tensor, divisor: Tensor) -> Tensor:
    # The quotient of the two scales first, as compressed-tensors has it: ties then fall alike.
    step = (scale / divisor).where(scale != 0, 1.0)
    return blocks / step[..., None]


def dequantize(
    packed: Tensor, scale: Tensor, divisor: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values [.., K]: element * (scale / divisor), in float32, then cast to `dtype`."""
    values = e2m1.decode_packed(packed).unflatten(-1, (-1, BLOCK))
    return (values * (scale.float() / divisor)[..., None]).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, divisor: Tensor | None = None) -> Tensor:
    """`dequantize(*quantize(x, divisor))` in one pass, in the dtype of `x`."""
    rounded, scale, divisor = elements(x, divisor)
    return (rounded * (scale / divisor)[..., None]).flatten(-2).to(x.dtype)


def elements(x: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize` stores, as float32 numbers: blocks [.., K/16, 16], scales, divisor."""
    blocks = to_blocks(x, BLOCK)
    if divisor is None:
        divisor = global_scale(_largest(x))
    scale = block_scale(blocks.abs().amax(-1), divisor)
    return round_to_element(_scaled(blocks, scale, divisor), E2M1), scale, divisor


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of x, zero of no numbers: an expert may get no tokens."""
    return x.abs().amax() if x.numel() else x.new_zeros(())
