"""Numbers to bytes and back: pure functions on tensors, no model, no file.

`FORMATS` lists every format by the name used on the command line and in checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.formats.e8m0 import RULES

__all__ = ["FORMATS", "RULES", "FormatInfo", "mxfp4", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class FormatInfo:
    """What a format costs: `element_bits` per value and one scale of 8 bits per `block`."""

    name: str
    element_bits: int
    block: int  # columns that share a scale; 0 = none
    scale: str  # "e8m0", "e4m3" or ""

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return self.element_bits + (8 / self.block if self.block else 0.0)


FORMATS = {
    "mxfp4": FormatInfo("mxfp4", 4, mxfp4.BLOCK, "e8m0"),
    "nvfp4": FormatInfo("nvfp4", 4, nvfp4.BLOCK, "e4m3"),
    "mxfp8": FormatInfo("mxfp8", 8, mxfp8.BLOCK, "e8m0"),
    "bf16": FormatInfo("bf16", 16, 0, ""),
    "none": FormatInfo("none", 0, 0, ""),  # left as it is, at the width it has
}
