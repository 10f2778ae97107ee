"""MXFP8: blocks of 32 E4M3 values under an E8M0 scale (OCP Microscaling v1.0); 8.25 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import blocks as mx
from quantkit.formats import e8m0
from quantkit.formats.element import E4M3, round_to_element

BLOCK = 32


def quantize(x: Tensor, rule: str = "even") -> tuple[Tensor, Tensor]:
    """Quantize [.., K]: values float8_e4m3fn [.., K] and scales uint8 E8M0 [.., K/32].

    Raises ValueError when K is not a multiple of 32. A block with a NaN or an infinity gets the
    NaN scale (255).
    """
    blocks = mx.to_blocks(x, BLOCK)
    return _cast(blocks, mx.exponents(blocks, E4M3, rule))


def quantize_with_exponents(x: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [.., K] at given scale exponents int32 [.., K/32] (in -127..127)."""
    return _cast(mx.to_blocks(x, BLOCK), exponent)


def _cast(blocks: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    rounded = round_to_element(mx.scaled(blocks, exponent), E4M3)  # saturates; the cast would not
    return rounded.flatten(-2).to(torch.float8_e4m3fn), e8m0.encode(exponent)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [.., K] of E4M3 elements and scales; exact in float32 and bfloat16."""
    values = weight.float().unflatten(-1, (-1, BLOCK))
    return (values * e8m0.decode(scale)[..., None]).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, rule: str = "even") -> Tensor:
    """`dequantize(*quantize(x, rule))` in one pass, in the dtype of `x`."""
    return mx.fake_quantize(x, E4M3, rule, BLOCK)
