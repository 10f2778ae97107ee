"""One interface for every way of rounding a weight to its format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.pack.gptq import compensate, towards
from quantkit.pack.grid import Grid
from quantkit.pack.rtn import round_nearest
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.search import FACTORS, FOUR_OVER_SIX, search_grid

METHODS = ("rtn", "search", "gptq", "learned")
FROM_INPUTS = ("gptq", "learned")  # need calibration text: blocks are packed one after another

PackedLinear = dict[str, Tensor]  # the main path's tensors by name, see pack/layout.py


@dataclass(frozen=True)
class Rounded:
    """A weight on its way to bytes: plain rounding of `latent` [out, in] to `grid` is the result.

    `branch` [out, k] are the columns of the branch, which may have moved to take up error.
    """

    latent: Tensor
    grid: Grid
    branch: Tensor | None = None

    def encode(self) -> PackedLinear:
        """The main path's tensors."""
        return self.grid.encode(self.latent)

    def split(self, rows: list[int]) -> list[Rounded]:
        """Linears that were rounded together, by their numbers of outputs."""
        scales = self.grid.scale.split(rows)
        grids = [Grid(self.grid.name, scale, self.grid.divisor) for scale in scales]
        branches = [None] * len(rows) if self.branch is None else self.branch.split(rows)
        return [
            Rounded(*part) for part in zip(self.latent.split(rows), grids, branches, strict=True)
        ]


def round_weight(
    w: Tensor,
    fmt: SiteFormat,
    *,
    method: str = "rtn",
    hessian: Tensor | None = None,
    rule: str = "even",
    divisor: Tensor | None = None,
    four_over_six: bool = False,
) -> PackedLinear:
    """Round `w` [out, in], already without its separated channels and rotated, to `fmt`.

    `hessian` is the second moment of the inputs as they are at run time: [in, in] for gptq, its
    diagonal [in] is enough for search (None: all columns alike). `divisor` is the global scale
    that a fused group shares (NVFP4).
    """
    if method not in METHODS:
        raise UsageError(f"unknown rounding {method!r}", f"one of {', '.join(METHODS)}")
    if fmt.weights == "none" or (method == "rtn" and not four_over_six):
        return round_nearest(w, fmt, rule, divisor)
    if method in ("rtn", "search"):
        importance = hessian if hessian is None or hessian.dim() == 1 else hessian.diagonal()
        importance = importance if method == "search" else None
        factors = FACTORS if method == "search" else FOUR_OVER_SIX
        return search_grid(w, fmt.weights, rule, divisor, importance, factors=factors).encode(w)
    if hessian is None:
        raise UsageError("gptq rounds for inputs it has seen", "give calibration text: --data")
    return round_for_inputs(w, None, fmt, hessian, rule, divisor, four_over_six).encode()


def round_for_inputs(
    rest: Tensor,
    columns: Tensor | None,
    fmt: SiteFormat,
    hessian: Tensor,
    rule: str,
    divisor: Tensor | None = None,
    four_over_six: bool = False,
    cross: Tensor | None = None,
) -> Rounded:
    """GPTQ of the main path's `rest` [out, in] and the branch's `columns` [out, k] together.

    `hessian` [in + k]^2: of the quantized main inputs followed by the branch's. `cross`, the same
    with the unquantized model's inputs on the left, asks for that model's outputs (`towards`).
    """
    width = rest.shape[1]
    importance = hessian.diagonal()[:width]

    def grid_of(w: Tensor) -> Grid:
        if four_over_six:
            return search_grid(w, fmt.weights, rule, divisor, importance, factors=FOUR_OVER_SIX)
        return search_grid(w, fmt.weights, rule, divisor, importance)

    together = rest if columns is None else torch.cat([rest, columns], 1)
    free = 0 if columns is None else columns.shape[1]
    if cross is not None:
        together = towards(together, hessian, cross)
    latent, moved, grid = compensate(together, hessian, grid_of, free=free)
    return Rounded(latent, grid, None if columns is None else moved)
