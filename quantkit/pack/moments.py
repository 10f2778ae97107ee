"""Second moments of inputs, which GPTQ works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.parallel import Ranks
from quantkit.formats.e8m0 import power_of_two


class SecondMoment:
    """The mean outer product of a site's inputs, gathered batch by batch.

    A batch's product is a float32 matrix, the sum over batches float64: adding up some hundred
    numbers of 24 bits loses nothing there, so neither the order of the batches nor which process
    saw which of them changes a bit of the mean.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """total += y^T x (default: x^T x) for a batch's x and y [tokens, n]."""
        exact = x.dtype == torch.bfloat16  # products of such values are exact in float32
        exact = exact and (y is None or y.dtype == x.dtype)
        x = x.float()
        y = x if y is None else y.float()
        with in_bfloat16() if exact and x.device.type == "cpu" else nullcontext():
            product = y.t() @ x
        self.total += product

    def mean(self, count: int, ranks: Ranks) -> Tensor:
        """The mean over the `count` tokens that all processes saw: float32 [n, n]."""
        ranks.add_up(self.total)
        return self.total.div_(count).float()


def token_scales(x: Tensor) -> Tensor:
    """Powers of two [tokens, 1] that bring every token of x [tokens, n] to a mean square in 1 to 4.

    In the dtype of x, where the product is exact. Without them a few tokens decide what a weight
    is rounded for: an attention sink's input of `down_proj` can have a thousand times the energy
    of any other's, and rounding would keep its output, which the next norm divides by as much.
    """
    size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    size = size * x.shape[1] ** -0.5
    return power_of_two((1 - torch.frexp(size).exponent).clamp(-120, 120)).to(x.dtype)


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Let float32 products on a CPU read their factors as bfloat16 (sums stay float32)."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
