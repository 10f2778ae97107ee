"""Second moments of inputs, which GPTQ works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def add_outer(total: Tensor, x: Tensor) -> None:
    """total += x^T x in float32, for x [tokens, n]."""
    exact = x.dtype == torch.bfloat16  # products of its values lose nothing in float32
    x = x.float()
    with in_bfloat16() if exact and x.device.type == "cpu" else nullcontext():
        total.addmm_(x.t(), x)


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
