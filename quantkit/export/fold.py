"""Fold what only quantkit can run back into a weight, and round again what that changed.

The branch's columns go back to their places, an online Hadamard that the target has no word for is
undone. Blocks that no separated channel falls into keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.formats import blocks as mx
from quantkit.formats import e8m0, nvfp4
from quantkit.kernels.reference import branch_weight, dequantized_weight
from quantkit.pack.grid import Grid
from quantkit.pack.layout import channels_of
from quantkit.pack.rtn import PIECE, power_of_two_below
from quantkit.pack.scheme import SiteFormat
from quantkit.transforms.hadamard import rotate, rotate_back

PER_TENSOR = ("weight_global_scale", "input_global_scale", "outlier_index")  # not one row an output


@dataclass(frozen=True)
class Folded:
    """A plain weight's tensors, and what rounding again cost: sums of squares over the weight."""

    tensors: dict[str, Tensor]
    error: float
    energy: float


def plain_format(fmt: SiteFormat, keep_hadamard: bool) -> SiteFormat:
    """The format of a site without a branch, and without its Hadamard unless that is kept."""
    hadamard = fmt.hadamard if keep_hadamard else None
    return replace(fmt, branch=None, outliers=0, hadamard=hadamard)


def fold_group(
    group: Sequence[Mapping[str, Tensor]], fmt: SiteFormat, rule: str, keep_hadamard: bool
) -> list[Folded]:
    """Fold the linears that loaders fuse (q, k, v; gate, up): they share NVFP4's global scale.

    `group`: the packed tensors of each, by the names of pack/layout.py. The input's global scale,
    if any, is not touched: the caller has to widen it for the channels that come back.
    """
    plain = plain_format(fmt, keep_hadamard)
    divisor = None
    if plain.weights == "nvfp4":
        pieces = (_whole(p, fmt, keep_hadamard)[0] for tensors in group for p in _pieces(tensors))
        largest = torch.stack([whole.abs().amax() for whole in pieces]).amax()
        divisor = power_of_two_below(nvfp4.global_scale(largest))
        divisor = torch.minimum(divisor, group[0]["weight_global_scale"])
    done = []
    for tensors in group:
        parts, error, energy = [], 0.0, 0.0
        for piece in _pieces(tensors):
            whole, changed = _whole(piece, fmt, keep_hadamard)
            grid = _grid(piece, whole, changed, plain.weights, rule, divisor)
            parts.append(grid.encode(whole))
            error += float((dequantized_weight(parts[-1], plain).double() - whole).square().sum())
            energy += float(whole.double().square().sum())
        found = {
            name: parts[0][name] if name in PER_TENSOR else torch.cat([p[name] for p in parts])
            for name in parts[0]
        }
        if "input_global_scale" in tensors:
            found["input_global_scale"] = tensors["input_global_scale"]
        done.append(Folded(found, error, energy))
    return done


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of a few rows at a time: bounds the float32 temporaries."""
    rows, per_row = tensors["weight_scale"].shape
    step = max(PIECE // (per_row * 32), 1)
    for start in range(0, rows, step):
        yield {
            name: tensor if name in PER_TENSOR else tensor[start : start + step]
            for name, tensor in tensors.items()
        }


def _whole(
    tensors: Mapping[str, Tensor], fmt: SiteFormat, keep_hadamard: bool
) -> tuple[Tensor, Tensor | None]:
    """The weight [out, in] float32 with its branch in place, and where folding changed it.

    None: everywhere.
    """
    main, size = dequantized_weight(tensors, fmt), fmt.hadamard_size
    back = torch.zeros_like(main)
    channels = channels_of(tensors)
    if channels is not None:
        branch = branch_weight(tensors, fmt, torch.float32)[:, : len(channels)]
        back.index_copy_(1, channels, branch)
    if size and not keep_hadamard:
        return rotate_back(main, size) + back, None
    if size:
        back = rotate(back, size)
    return main + back, back != 0


def _grid(
    tensors: Mapping[str, Tensor],
    whole: Tensor,
    changed: Tensor | None,
    name: str,
    rule: str,
    divisor: Tensor | None,
) -> Grid:
    """The block scales of the folded weight: those of the file where nothing changed."""
    grid = Grid(name, tensors["weight_scale"], divisor)
    blocks = mx.to_blocks(whole, grid.block)
    if divisor is not None:
        # Both divisors are powers of two: a scale that stays a number of E4M3 keeps its step.
        before = tensors["weight_scale"].float() * (divisor / tensors["weight_global_scale"])
        scale = nvfp4.block_scale(blocks.abs().amax(-1), divisor)
        representable = before.to(torch.float8_e4m3fn).float() == before
        before = before.where(representable, scale)
    else:
        before = tensors["weight_scale"].int() - e8m0.encode(torch.tensor(0)).int()
        scale = mx.exponents(blocks, grid.element, rule)
    if changed is not None:
        touched = changed.unflatten(-1, (-1, grid.block)).any(-1)
        scale = torch.where(touched, scale, before)
    return Grid(name, scale, divisor)
