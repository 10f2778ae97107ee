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
from quantkit.formats import FORMATS, mxfp4, nvfp4

CRITERIA = ("energy", "output", "weighted")
DRAWS = 512  # of a channel, for what its rounding loses
DRAWN = 1 << 20  # numbers at a time


def branch_columns(width: int, bits: float, bits_per_weight: float, alignment: int) -> int:
    """Branch columns of a site that `bits` per weight pay for, at least one alignment.

    `bits_per_weight` is what the branch's own columns cost: 8, 16 or those of a 4-bit format.
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


def choose_lossy(
    energy: Tensor, weight_energy: Tensor, count: int, criterion: str, name: str
) -> Tensor:
    """The `count` channels for a residual, whose rounding to format `name` costs most.

    Ascending int64. They stay in their blocks, so nothing is saved there, unlike above:
    `weighted` takes what rounding itself loses of a channel (`expected_loss`), times its weights.
    """
    if criterion == "weighted":
        return _largest(expected_loss(energy, name) * weight_energy.double(), count)
    return choose_free(energy, weight_energy, count, criterion, 1)


def expected_loss(energy: Tensor, name: str) -> Tensor:
    """Energy that rounding to format `name` takes from channels of such energies: float64 [width].

    Measured on normal noise, drawn by a generator of its own. It is no function of a channel's
    energy alone: the largest of a block sets the steps of all, and in NVFP4 loses next to nothing
    itself.
    """
    block = FORMATS[name].block or 1
    generator = torch.Generator().manual_seed(0)
    divisor = nvfp4.global_scale(8 * energy.amax().sqrt())
    lost = []
    for part in energy.float().sqrt().split(DRAWN // DRAWS // block * block):
        x = torch.randn(DRAWS, len(part), generator=generator) * part
        rounded = x
        if name == "nvfp4":
            rounded = nvfp4.fake_quantize(x, divisor)
        elif name == "mxfp4":
            rounded = mxfp4.fake_quantize(x)
        lost.append((x - rounded).double().square().mean(0))
    return torch.cat(lost)


def evened(energy: Tensor, size: int) -> Tensor:
    """Energies [width] behind a Hadamard of `size` channels, which spreads them (0: none)."""
    if not size:
        return energy
    blocks = energy.view(-1, size)
    return blocks.mean(1, keepdim=True).expand_as(blocks).flatten()


def _largest(score: Tensor, count: int) -> Tensor:
    order = score.argsort(descending=True, stable=True)[:count]
    return order[score[order] > 0].sort().values
