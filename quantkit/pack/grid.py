"""The values a weight may take once its block scales are fixed: what rounding methods share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import FORMATS, e8m0, mxfp4, mxfp8, nvfp4
from quantkit.formats.element import E2M1, E4M3, Element, round_to_element


@dataclass(frozen=True)
class Grid:
    """Block scales of a weight [out, in] in format `name`.

    `scale` [out, in / block]: int32 exponents (MX formats) or float32 E4M3 values (NVFP4, with its
    `divisor` float32 [1]).
    """

    name: str
    scale: Tensor
    divisor: Tensor | None = None

    @property
    def element(self) -> Element:
        """The element type of the format."""
        return E4M3 if self.name == "mxfp8" else E2M1

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return FORMATS[self.name].block

    def step(self) -> Tensor:
        """What an element of value one stands for: float32 [out, in / block], never zero."""
        if self.divisor is None:
            return e8m0.power_of_two(self.scale)
        return (self.scale / self.divisor).where(self.scale != 0, 1.0)

    def steps(self) -> Tensor:
        """`step` of every column: float32 [out, in]."""
        return self.step().repeat_interleave(self.block, dim=1)

    def round(self, w: Tensor) -> Tensor:
        """The nearest values of the grid, float32 [out, in]."""
        step = self.step()[..., None]
        blocks = w.float().unflatten(-1, (-1, self.block))
        return (round_to_element(blocks / step, self.element) * step).flatten(-2)

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        """Round `w` and give its bytes by the names of pack/layout.py."""
        if self.name == "mxfp8":
            codes, scale = mxfp8.quantize_with_exponents(w, self.scale)
            return {"weight": codes, "weight_scale": scale}
        if self.name == "mxfp4":
            codes, scale = mxfp4.quantize_with_exponents(w, self.scale)
            return {"weight_packed": codes, "weight_scale": scale}
        assert self.divisor is not None
        codes, scale, divisor = nvfp4.quantize_with_scales(w, self.scale, self.divisor)
        return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": divisor}


def rule_grid(w: Tensor, name: str, rule: str, divisor: Tensor | None = None) -> Grid:
    """The scales that round to nearest uses: by `rule`, or NVFP4's maximum over six."""
    blocks = w.float().unflatten(-1, (-1, FORMATS[name].block))
    if name == "nvfp4":
        assert divisor is not None
        return Grid(name, nvfp4.block_scale(blocks.abs().amax(-1), divisor), divisor)
    from quantkit.formats.blocks import exponents

    exponent = exponents(blocks, E4M3 if name == "mxfp8" else E2M1, rule)
    if bool((exponent == e8m0.NAN_EXPONENT).any()):
        raise ValueError("a weight with NaN or infinity has no grid")
    return Grid(name, exponent)


def merge_better(current: Grid, other: Grid, better: Tensor) -> Grid:
    """The scales of `other` where `better` [out, in / block] says so, else of `current`."""
    return Grid(current.name, torch.where(better, other.scale, current.scale), current.divisor)
