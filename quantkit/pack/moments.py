"""Second moments of inputs, which GPTQ works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def add_outer(total: Tensor, x: Tensor, y: Tensor | None = None) -> None:
    """total += y^T x (default: x^T x) in float32, for x and y [tokens, n]."""
    y = x if y is None else y
    exact = x.dtype == y.dtype == torch.bfloat16  # products of such values lose nothing in float32
    x, y = x.float(), y.float()
    with in_bfloat16() if exact and x.device.type == "cpu" else nullcontext():
        total.addmm_(y.t(), x)


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
