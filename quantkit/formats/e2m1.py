"""E2M1 codes (sign, two exponent bits, one mantissa bit) and their packing, two to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats.element import E2M1, round_to_element

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of the code


def encode(x: Tensor) -> Tensor:
    """Round `x` to E2M1 and return its codes, uint8 in 0..15 (nearest even, saturating).

    E2M1 has no NaN: the caller marks such blocks in the scale; here they give the largest code.
    """
    rounded = round_to_element(x.float(), E2M1)
    bits = rounded.view(torch.int32)
    magnitude = rounded.abs()
    # Normals hold exponent and mantissa in adjacent bits already; 0 and 0.5 are codes 0 and 1.
    normal = ((bits & 0x7FFFFFFF) >> 22) - 252
    code = torch.where(magnitude >= 1, normal, (magnitude + magnitude).nan_to_num(7).int())
    code = torch.where(magnitude.isnan(), 7, code)
    return (code | ((bits >> 28) & 8)).to(torch.uint8)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes 0..15 to their values."""
    table = torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=dtype, device=codes.device)
    return table[codes.int()]


def pack(codes: Tensor) -> Tensor:
    """Codes [.., K] to bytes [.., K/2]: the even column in the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of columns ({codes.shape[-1]})")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes [.., K/2] to codes [.., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes [.., K/2] to values [.., K]; one table look-up per byte."""
    byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    pairs = decode(unpack(byte[:, None]), dtype)  # [256, 2]
    return pairs[packed.int()].flatten(-2)
