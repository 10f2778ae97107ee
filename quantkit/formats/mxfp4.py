"""MXFP4: blocks of 32 E2M1 values under an E8M0 scale (OCP Microscaling v1.0); 4.25 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import blocks as mx
from quantkit.formats import e2m1, e8m0
from quantkit.formats.element import E2M1

BLOCK = 32


def quantize(x: Tensor, rule: str = "even") -> tuple[Tensor, Tensor]:
    """Quantize [.., K]: packed codes uint8 [.., K/2] and scales uint8 E8M0 [.., K/32].

    Raises ValueError when K is not a multiple of 32. A block with a NaN or an infinity gets the
    NaN scale (255).
    """
    blocks = mx.to_blocks(x, BLOCK)
    return _pack(blocks, mx.exponents(blocks, E2M1, rule))


def quantize_with_exponents(x: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [.., K] at given scale exponents int32 [.., K/32] (in -127..127)."""
    return _pack(mx.to_blocks(x, BLOCK), exponent)


def _pack(blocks: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    codes = e2m1.encode(mx.scaled(blocks, exponent)).flatten(-2)
    return e2m1.pack(codes), e8m0.encode(exponent)


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [.., K] of packed codes and scales; exact in float32 and bfloat16."""
    values = e2m1.decode_packed(packed).unflatten(-1, (-1, BLOCK))
    return (values * e8m0.decode(scale)[..., None]).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, rule: str = "even") -> Tensor:
    """`dequantize(*quantize(x, rule))` in one pass, in the dtype of `x`."""
    return mx.fake_quantize(x, E2M1, rule, BLOCK)
