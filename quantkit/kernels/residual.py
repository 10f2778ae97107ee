"""A residual branch on kernels that know of none: their GEMM, on an input that is k columns wider.

The residual is made here, in torch, by the reference's own functions, and put behind the input in
its dtype; the kernel then quantizes both alike. Blocks do not straddle the seam (the widths are
whole blocks), so the arithmetic is that of the reference. A rotated input has its residual behind
the rotation, which is then made here as well; only kernels that take float32 go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.kernels.rotation import rotated

if TYPE_CHECKING:
    from quantkit.kernels.dispatch import Work


def widened(work: Work) -> Work:
    """The same site as its kernel sees it: no branch, K + k channels, float32 where rotated."""
    wide = replace(work, branch=None, outliers=0, width=work.width + work.outliers)
    return replace(wide, hadamard=None, dtype=torch.float32) if work.hadamard else wide


class ResidualLinear(nn.Module):
    """Computes [M, sum(outputs)] of x [M, K] by a kernel for [M, K + k]."""

    channels: Tensor
    divisor: Tensor | None

    def __init__(
        self, work: Work, linears: Sequence[Mapping[str, Tensor]], kernel: nn.Module
    ) -> None:
        super().__init__()
        self.activations, self.rule, self.columns = work.activations, work.rule, work.outliers
        self.hadamard = next(iter(work.hadamard.values())) if work.hadamard else 0
        self.kernel = kernel
        index = linears[0]["outlier_index"]
        self.register_buffer("channels", index[index >= 0].long(), persistent=False)
        divisor = linears[0].get("input_global_scale")
        self.register_buffer("divisor", divisor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        z = self.with_residual(x)
        if z.dtype == x.dtype:
            return self.kernel(z)
        return self.kernel.multiply(*self.kernel.quantize(z), x.dtype)  # type: ignore[operator]

    def with_residual(self, x: Tensor) -> Tensor:
        """x [M, K], rotated, and what its quantization loses of the channels: [M, K + k]."""
        from quantkit.kernels.reference import quantize_activations, residual

        if self.hadamard > 1:
            x = rotated(x, self.hadamard)
        quantized = quantize_activations(x, self.activations, self.rule, self.divisor)
        return torch.cat([x, residual(x, quantized, self.channels, self.columns)], dim=-1)
