"""E8M0 block scales: powers of two chosen from a block's largest magnitude by a named rule.

Rules (amax = m * 2^p with 1 <= m < 2, emax = exponent of the element's largest value):

    floor   p - emax                         OCP Microscaling v1.0; the block maximum may saturate
    even    as floor, after rounding amax to the element's precision
    even4   as floor, after rounding amax to E2M1's precision, whatever the element: the scales of
            compressed-tensors, under which E4M3 never saturates
    ceil    ceil(log2 amax) - emax           never saturates
    rceil   ceil(log2(amax / max_element))   the smallest scale that never saturates
    mse     the exponent among even - 1, even, even + 1 with the least squared error of the block
            (formats decide it; here it stands for `even`)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats.element import E2M1, Element

RULES = ("floor", "even", "even4", "ceil", "rceil", "mse")
NAN_EXPONENT = 128  # code 255: the whole block is NaN
_MANTISSA = 23  # of float32


def carry(element: Element, rule: str) -> int:
    """The integer that, added to a float32's bits, carries into the exponent when `rule` bumps."""
    one = 1 << _MANTISSA
    if rule == "floor":
        return 0
    if rule in ("even", "mse"):  # half a unit in the last place of the element
        return 1 << (_MANTISSA - element.mantissa_bits - 1)
    if rule == "even4":
        return 1 << (_MANTISSA - E2M1.mantissa_bits - 1)
    if rule == "ceil":  # any mantissa bit
        return one - 1
    if rule == "rceil":  # any mantissa above that of the largest element
        largest = round((element.maximum / 2.0**element.max_exponent - 1) * one)
        return one - largest - 1
    raise ValueError(f"unknown scale rule {rule!r}: one of {', '.join(RULES)}")


def scale_exponent(amax: Tensor, element: Element, rule: str = "even") -> Tensor:
    """Exponents int32, at least -127, of the scales of blocks whose largest magnitude is `amax`.

    Blocks of zeros get -127 (the code of the smallest scale), blocks with a NaN or an infinity
    128 (the NaN code). `amax` is any float dtype, non-negative; the result has its shape.
    """
    bits = amax.float().view(torch.int32)
    finite = bits < 0x7F800000
    power = ((bits.where(finite, 0) + carry(element, rule)) >> _MANTISSA) - 127
    exponent = (power - element.max_exponent).clamp(-127, largest_exponent(element))
    return exponent.where(finite, NAN_EXPONENT)


def largest_exponent(element: Element) -> int:
    """The largest scale exponent under which every element is still finite in float32."""
    return 127 - element.max_exponent


def encode(exponent: Tensor) -> Tensor:
    """Exponents to E8M0 bytes (uint8, bias 127)."""
    return (exponent + 127).to(torch.uint8)


def decode(code: Tensor) -> Tensor:
    """E8M0 bytes (uint8 or float8_e8m0fnu) to float32 scales; code 255 is NaN."""
    if code.dtype == torch.float8_e8m0fnu:
        code = code.view(torch.uint8)
    return power_of_two(code.to(torch.int32) - 127)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exact, for int32 exponents in [-127, 127]; 128 gives NaN."""
    bits = (exponent + 127) << _MANTISSA
    bits = bits.where(exponent > -127, 1 << (_MANTISSA - 1))  # 2^-127 is subnormal
    return bits.where(exponent < NAN_EXPONENT, 0x7FC00000).view(torch.float32)
