"""Round to nearest: a weight [out, in] to the bytes of a format, rows in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.pack.scheme import SiteFormat

PIECE = 1 << 22  # weights rounded at a time: bounds the float32 temporaries


def round_nearest(
    w: Tensor, fmt: SiteFormat, rule: str, divisor: Tensor | None = None
) -> dict[str, Tensor]:
    """Round `w` [out, in] to `fmt.weights`; the main path's tensors by name (pack/layout.py).

    `divisor` is NVFP4's global scale (default: of this weight alone).
    """
    if fmt.weights == "none":
        return {"weight": w}
    if fmt.weights == "nvfp4":
        shared = global_divisor([w]) if divisor is None else divisor
        names = ("weight_packed", "weight_scale")
        found = _by_pieces(w, names, lambda part: nvfp4.quantize(part, shared)[:2])
        return found | {"weight_global_scale": shared}
    if fmt.weights == "mxfp4":
        names = ("weight_packed", "weight_scale")
        return _by_pieces(w, names, lambda part: mxfp4.quantize(part, rule))
    return _by_pieces(w, ("weight", "weight_scale"), lambda part: mxfp8.quantize(part, rule))


def _by_pieces(
    w: Tensor, names: tuple[str, ...], quantize: Callable[[Tensor], tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    done = [quantize(part) for part in row_pieces(w)]
    return {
        name: torch.cat(column) for name, column in zip(names, zip(*done, strict=True), strict=True)
    }


def row_pieces(w: Tensor) -> Iterator[Tensor]:
    """Views of a few rows at a time."""
    yield from w.split(max(PIECE // max(w.shape[1], 1), 1))


def global_divisor(weights: list[Tensor]) -> Tensor:
    """NVFP4's global scale of weights that are used side by side, float32 [1]: a power of two.

    A power of two leaves the block scales' precision as it is, and the dequantized values exact
    in bfloat16: six bits of element times block scale.
    """
    largest = torch.stack([part.abs().amax() for w in weights for part in row_pieces(w)]).amax()
    return power_of_two_below(nvfp4.global_scale(largest))


def power_of_two_below(divisor: Tensor) -> Tensor:
    """The largest power of two not above a positive float32 number."""
    return (divisor.view(torch.int32) & 0x7F800000).view(torch.float32)
