"""What the MX formats share: blocks of 32, an E8M0 scale, the squared-error choice of exponent."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import e8m0
from quantkit.formats.element import Element, round_to_element, round_to_element_


def to_blocks(x: Tensor, block: int) -> Tensor:
    """View [.., K] as float32 blocks [.., K/block, block]; ValueError when K does not divide."""
    width = x.shape[-1]
    if width % block:
        raise ValueError(f"width {width} is not a multiple of the block size {block}")
    return x.unflatten(-1, (width // block, block)).float()


def exponents(blocks: Tensor, element: Element, rule: str) -> Tensor:
    """Scale exponents of blocks [.., n, block] by `rule`: int32 [.., n]."""
    exponent = e8m0.scale_exponent(blocks.abs().amax(-1), element, rule)
    return least_error(blocks, exponent, element) if rule == "mse" else exponent


def least_error(blocks: Tensor, center: Tensor, element: Element) -> Tensor:
    """Of center, center - 1, center + 1, the exponent with the least squared error per block.

    `center` wins ties, then the smaller exponent. NaN blocks keep their mark.
    """
    best, best_error = center, _squared_error(blocks, center, element)
    for step in (-1, 1):
        other = (center + step).clamp(-127, e8m0.largest_exponent(element))
        error = _squared_error(blocks, other, element)
        better = (error < best_error) & (center < e8m0.NAN_EXPONENT)
        best, best_error = other.where(better, best), error.where(better, best_error)
    return best


def _squared_error(blocks: Tensor, exponent: Tensor, element: Element) -> Tensor:
    return (dequantized(blocks, exponent, element) - blocks).square().sum(-1)


def scaled(blocks: Tensor, exponent: Tensor) -> Tensor:
    """blocks * 2^-exponent, exact; blocks marked NaN become NaN."""
    inverse = e8m0.power_of_two(-exponent.clamp(max=127))
    return blocks * inverse.where(exponent < e8m0.NAN_EXPONENT, torch.nan)[..., None]


def dequantized(blocks: Tensor, exponent: Tensor, element: Element) -> Tensor:
    """Blocks rounded to `element` at the given exponents, back in their own range (float32)."""
    rounded = round_to_element(scaled(blocks, exponent), element)
    return rounded * e8m0.power_of_two(exponent)[..., None]


def fake_quantize(x: Tensor, element: Element, rule: str, block: int) -> Tensor:
    """Quantize [.., K] and give back the values the bytes stand for, in the dtype of `x`.

    Exact in float32 and bfloat16. Blocks with a NaN or an infinity become NaN.
    """
    if rule == "mse" or x.dtype not in (torch.bfloat16, torch.float32):
        blocks = to_blocks(x, block)
        out = dequantized(blocks, exponents(blocks, element, rule), element)
        return out.flatten(-2).to(x.dtype)
    if x.shape[-1] % block:
        raise ValueError(f"width {x.shape[-1]} is not a multiple of the block size {block}")
    blocks = x.contiguous().view(-1, block)
    rows = _CACHED_ELEMENTS // block
    if x.device.type != "cpu" or torch.compiler.is_compiling() or len(blocks) <= rows:
        return _fake_quantize_rows(blocks, element, rule).view(x.shape)
    out = torch.empty_like(blocks)
    for start in range(0, len(blocks), rows):
        piece = slice(start, start + rows)
        out[piece] = _fake_quantize_rows(blocks[piece], element, rule)
    return out.view(x.shape)


# Elements worked on at a time on a CPU, so that the dozen passes over them stay in its cache.
_CACHED_ELEMENTS = 1 << 17


def _fake_quantize_rows(blocks: Tensor, element: Element, rule: str) -> Tensor:
    """The activation quantizer: [n, block] in bfloat16 or float32, few passes, in place."""
    if blocks.dtype == torch.bfloat16:  # integers order like magnitudes, and reduce much faster
        amax = (blocks.view(torch.int16) & 0x7FFF).amax(-1, keepdim=True).int() << 16
    else:
        amax = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True)
    exponent = e8m0.scale_exponent(amax.view(torch.float32), element, rule)
    inverse = e8m0.power_of_two(-exponent.clamp(max=127))
    values = round_to_element_(blocks * inverse, element)
    return values.mul_(e8m0.power_of_two(exponent)).to(blocks.dtype)
