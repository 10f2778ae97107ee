"""Choose the channels of a site freely: the best of all, several in a group where it pays.

One channel a group (the paper) spends the branch evenly. Quantization noise does not fall
evenly: a block of inputs with energies e and weights with energies v (summed over the outputs)
loses about e_block * v_block, and taking channel c out of it saves
e_block v_block - (e_block - e_c)(v_block - v_c). Taking the best channel again and again
minimises the sum, an estimate of the output's error, for a given size of the branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import UsageError

CRITERIA = ("energy", "output", "weighted")


def branch_columns(width: int, bits: float, bits_per_weight: int, alignment: int) -> int:
    """Branch columns of a site that `bits` per weight pay for, at least one alignment.

    `bits_per_weight` is the branch's own precision, 8 or 16.
    """
    if not 0 < bits <= 8:
        raise UsageError(f"--branch-bits {bits}: between 0 and 8")
    columns = int(bits * width / bits_per_weight / alignment) * alignment
    return min(max(columns, alignment), width)


def choose_free(
    energy: Tensor, weight_energy: Tensor, count: int, criterion: str, block: int
) -> Tensor:
    """The `count` channels to separate, ascending int64.

    `energy` [width] mean square of the inputs, `weight_energy` [width] sum of squares of the
    weights that meet them, `block` the channels that share a scale. Criteria: `energy`; `output`
    (both energies' product); `weighted` (the block estimate above).
    """
    energy, weight_energy = energy.double(), weight_energy.double()
    if criterion == "energy":
        return _largest(energy, count)
    if criterion == "output":
        return _largest(energy * weight_energy, count)
    if criterion != "weighted":
        raise UsageError(f"--criterion {criterion}: with a budget, one of {', '.join(CRITERIA)}")
    left, weights = energy.clone().view(-1, block), weight_energy.clone().view(-1, block)
    chosen = []
    for _ in range(count):
        of_block, weight_of_block = left.sum(1, keepdim=True), weights.sum(1, keepdim=True)
        saved = of_block * weight_of_block - (of_block - left) * (weight_of_block - weights)
        best = int(saved.argmax())
        if float(saved.view(-1)[best]) <= 0:
            break
        chosen.append(best)
        left.view(-1)[best] = weights.view(-1)[best] = 0
    return torch.tensor(sorted(chosen), dtype=torch.long)


def _largest(score: Tensor, count: int) -> Tensor:
    order = score.argsort(descending=True, stable=True)[:count]
    return order[score[order] > 0].sort().values
