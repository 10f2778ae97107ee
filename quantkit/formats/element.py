"""Small floating-point elements (E2M1, E4M3) and rounding to their grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """A sign-magnitude float with subnormals, no infinity (OCP Microscaling v1.0, section 5.3)."""

    name: str
    mantissa_bits: int
    min_exponent: int  # of the smallest normal value
    max_exponent: int  # of the largest value: the "emax" of the scale rules
    maximum: float


E2M1 = Element("e2m1", 1, 0, 2, 6.0)
E4M3 = Element("e4m3", 3, -6, 8, 448.0)


def round_to_element(x: Tensor, element: Element) -> Tensor:
    """Round float32 `x` to the nearest value of `element`, ties to even, saturating.

    NaN stays NaN; the sign of zero is kept. Any shape; returns float32.
    """
    return torch.copysign(round_to_element_(x.clone(), element), x)


def round_to_element_(x: Tensor, element: Element) -> Tensor:
    """`round_to_element` in place; zeros come out positive."""
    x = x.clamp_(-element.maximum, element.maximum)
    # NOTE: adding 1.5 * 2^23 steps leaves no fraction bits in a float32, so the addition itself
    # rounds to a whole number of steps (nearest even), and the subtraction is exact.
    octave = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |x|)
    steps = 1.5 * 2.0 ** (23 - element.mantissa_bits)
    shift = octave.clamp_(min=2.0**element.min_exponent).mul_(steps)
    return x.add_(shift).sub_(shift)
