"""Block scales by search: of several candidates a block, the one with the least weighted error.

A weight's rounding error reaches the output through its input, so the squared error of each
column counts as much as that input's second moment (the diagonal of GPTQ's Hessian). For the MX
formats the candidates are the exponents around the rule's; for NVFP4 scales that map the block's
maximum to values from below 4 to above 6: clipping a little, or (as in Four Over Six) avoiding
the coarse gap between 4 and 6. Searching above the maximum's own scale is what PiSO adds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.formats import e8m0, nvfp4
from quantkit.formats.element import E4M3, round_to_element
from quantkit.pack.grid import Grid, merge_better, rule_grid

ROWS = 1 << 21  # weights judged at a time, so that the candidates stay in the processor's cache
FACTORS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.15, 1.25, 1.35, 1.5)
FOUR_OVER_SIX = (1.5,)  # the maximum at 4 instead of 6


def search_grid(
    w: Tensor,
    name: str,
    rule: str,
    divisor: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    factors: tuple[float, ...] = FACTORS,
) -> Grid:
    """The grid of `w` [out, in] whose rounding error weighted by `importance` [in] is least.

    `importance` None weighs all columns alike. Ties keep the rule's scale. `factors` are NVFP4's
    candidates as multiples of the scale that maps the block's maximum to 6.
    """
    rows = max(ROWS // w.shape[1], 1)
    parts = [_search(p, name, rule, divisor, importance, factors) for p in w.float().split(rows)]
    return Grid(name, torch.cat([part.scale for part in parts]), divisor)


def _search(
    w: Tensor,
    name: str,
    rule: str,
    divisor: Tensor | None,
    importance: Tensor | None,
    factors: tuple[float, ...],
) -> Grid:
    best = rule_grid(w, name, rule, divisor)
    if name == "mxfp8":
        return best  # 8-bit elements: the rule's scale never clips and loses next to nothing
    least = block_error(w, best, importance)
    for candidate in _candidates(w, best, factors):
        error = block_error(w, candidate, importance)
        better = error < least
        best, least = merge_better(best, candidate, better), error.where(better, least)
    return best


def _candidates(w: Tensor, base: Grid, factors: tuple[float, ...]) -> Iterator[Grid]:
    if base.divisor is None:
        for step in (-1, 1):
            shifted = (base.scale + step).clamp(-127, e8m0.largest_exponent(base.element))
            yield Grid(base.name, shifted)
        return
    amax = w.unflatten(-1, (-1, base.block)).abs().amax(-1)
    exact = base.divisor * (amax / base.element.maximum)
    for factor in factors:
        scale = round_to_element(exact * factor, E4M3)
        yield Grid(base.name, scale.where(scale != 0, nvfp4.SMALLEST_SCALE), base.divisor)


def block_error(w: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """Squared rounding error of every block [out, in / block], columns weighted."""
    error = (grid.round(w) - w).square()
    if importance is not None:
        error = error * importance.to(error)
    return error.unflatten(-1, (-1, grid.block)).sum(-1)
