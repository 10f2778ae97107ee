"""GPTQ on block formats: columns rounded one by one, their error moved to those still to come.

Minimises ||X W^T - X W~^T|| for the inputs X a linear really meets: transformed, separated,
quantized, and of about one length each, so that no attention sink outweighs all other tokens (see
`moments.token_scales`). The block scales are fixed beforehand and stay in the original column
order; columns are *visited* by decreasing second moment (static act-order). Columns of a 16-bit
branch are visited last and not rounded to the grid: they take up what the 4-bit columns leave
behind. GPTQ (2210.17323); static act-order as in MR-GPTQ (2509.23202).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.formats.element import round_to_element_
from quantkit.pack.grid import Grid

BLOCK = 64  # columns between two updates of the rest of the matrix
DAMPING = 0.1  # of the mean diagonal: less fits the calibration text more than the next one
BRANCH_DAMPING = 0.01  # a branch has few columns, and text enough for them
RIDGE = 1.0  # of the mean diagonal: less fits the calibration text more than the next one


def compensate(
    w: Tensor,
    hessian: Tensor,
    grid_of: Callable[[Tensor], Grid],
    *,
    free: int = 0,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor, Grid]:
    """Move rounding errors between the columns of `w` [out, in + free].

    `hessian` [in + free]^2 is the inputs' second moment; the last `free` columns belong to a
    branch. `grid_of` fixes the scales of the first `in` columns, whose diagonal grows by `damping`
    of the mean. Gives the compensated weight float32 [out, in], whose plain rounding to the grid
    is GPTQ's result, the branch's columns [out, free], and the grid. Columns that never saw an
    input keep their values.
    Raises QuantkitError when the second moments are not finite.
    """
    width = w.shape[1] - free
    grid = grid_of(w[:, :width])
    factor, order = _inverse_factor(hessian, width, damping)
    block_of = [column // grid.block for column in order.tolist()]
    steps = grid.step().t().contiguous()  # [blocks, out]
    columns = w.float().t()[order].contiguous()  # [in + free, out], in visiting order
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        inner = factor[first:last, first:last]
        part, errors = columns[first:last], torch.empty_like(columns[first:last])
        for i in range(last - first):
            step = steps[block_of[first + i]]
            rounded = round_to_element_(part[i] / step, grid.element).mul_(step)
            torch.sub(part[i], rounded, out=errors[i]).div_(inner[i, i])
            if i + 1 < last - first:
                part[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        columns[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    result = torch.empty_like(columns)
    result[order] = columns
    result = result.t()
    return result[:, :width].contiguous(), result[:, width:].contiguous(), grid


def towards(w: Tensor, hessian: Tensor, cross: Tensor, ridge: float = RIDGE) -> Tensor:
    """The weights that on quantized inputs X~ come nearest to `w` on the exact ones X.

    argmin over V of ||X w^T - X~ V^T||^2 + ridge ||V - w||^2 for `hessian` X~^T X~ and `cross`
    X^T X~, both [n, n] means over tokens; `ridge` in mean diagonals. float32 [out, n]. Inputs that
    differ because of earlier quantized layers, and their own rounding, are made up for as far as a
    linear map can: the asymmetric objective of GPTAQ (2504.02692) and Qronos (2505.11695).
    """
    solved = hessian.double().clone()
    solved.diagonal().add_(ridge * solved.diagonal().mean().clamp_min(1e-30))
    change = torch.linalg.solve(solved, (cross.double() - hessian.double()).t()).t()
    return w.float() + (w.double() @ change).float()


def _inverse_factor(hessian: Tensor, width: int, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse in visiting order, float32, and that order.

    Never fails on a singular matrix: a column without input is decoupled (unit diagonal), and the
    damping grows tenfold until the factorisation succeeds.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise QuantkitError("GPTQ: the inputs' second moments are not finite")
    matrix = hessian.double()
    diagonal = matrix.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    order = torch.cat(
        [
            diagonal[:width].argsort(descending=True, stable=True),
            torch.arange(width, len(diagonal), device=diagonal.device),
        ]
    )
    matrix = matrix.masked_fill(dead[:, None] | dead[None, :], 0.0)
    for attempt in range(12):
        damped = matrix.clone()
        damped.diagonal()[:width].add_(damping * 10.0**attempt * mean)
        damped.diagonal()[width:].add_(BRANCH_DAMPING * 10.0**attempt * mean)
        damped.diagonal().add_(mean * dead)
        lower, info = torch.linalg.cholesky_ex(damped[order][:, order])
        if int(info):
            continue
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(info) and bool(torch.isfinite(upper).all()):
            return upper.float(), order
    raise QuantkitError("GPTQ: the inputs' second moments cannot be factorised")
