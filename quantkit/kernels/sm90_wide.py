"""Packed linears on Hopper that FP8 cannot multiply exactly: in bfloat16 `wgmma`.

NVFP4 x NVFP4, and MXFP4 or MXFP8 weights beside MXFP8 activations, with a branch in the same
launch. Weights stay packed in memory and are decoded in registers; activations are rotated,
quantized and laid out as bfloat16 tiles by one kernel (`sm90_wide_activation`), or by torch
operations, the reference's own, where it does not know how: divisors of the moment, searched
scales, rotations that are no power of two in 32 to 512. The main loop and its schedules are those
of `sm90_gemm.cuh`.

A float16 input's bfloat16 branch is rounded to bfloat16, as in `sm90_activation.cuh`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quantkit.errors import QuantkitError
from quantkit.formats import FORMATS
from quantkit.kernels import jit, sm90, sm90_tiles
from quantkit.kernels import sm90_wide_activation as activation
from quantkit.kernels.capability import Kernel
from quantkit.kernels.prepare import BRANCH_COLUMNS
from quantkit.kernels.prepare_wide import prepare_fp4, prepare_mxfp8
from quantkit.kernels.sm90_wide_activation import Recipe

if TYPE_CHECKING:
    from quantkit.kernels.dispatch import Work

FORMS = {"nvfp4": "fp4 in bf16", "mxfp4": "fp4 in bf16", "mxfp8": "mxfp8 in bf16"}


def refuse(kernel: Kernel, work: Work) -> str | None:
    """Say why these shapes or options cannot run, None when they can."""
    block = FORMATS[work.weights].block
    if work.width % block:
        return f"{kernel.name} needs a width that is a multiple of {block}, not {work.width}"
    return None


def prepare(kernel: Kernel, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Stack the linears of a site in execution layout; compile what one token needs."""
    tile = sm90_tiles.plan(sum(work.outputs), work.width, 1).tile
    text = sm90_tiles.gemm_text(tile, FORMS[work.weights], work.branch)
    jit.compile(text, "sm90_gemm", sm90.ARCH)
    layer = WideLinear(work, linears)
    if layer.has_kernel:
        activation.compile_for(work.dtype, work.activations)
    device = layer.rows.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        sm90.reserve(device)
    return layer


class WideLinear(nn.Module):
    """Computes [M, sum(outputs)] of x [M, K]; buffers hold the execution layout.

    `quantize` takes float32 as well.
    """

    weights: Tensor
    rows: Tensor
    index: Tensor
    divisor: Tensor | None
    channels: Tensor | None
    keep: Tensor | None
    outlier_index: Tensor | None

    def __init__(self, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.width, self.form, self.branch = work.width, FORMS[work.weights], work.branch
        hadamard = next(iter(work.hadamard.values())) if work.hadamard else 0
        self.recipe = Recipe(work.activations, work.rule, hadamard, work.branch)
        lay_out = prepare_mxfp8 if work.weights == "mxfp8" else prepare_fp4
        weights, rows, places, first = [], [], [], 0
        for linear in linears:  # each has its own padding: its rows are found again by `places`
            plane = lay_out(linear)
            weights.append(plane.weights)
            rows.append(plane.rows)
            places.append(torch.arange(first, first + len(linear["weight_scale"])))
            first += len(plane.rows)
        self.outputs = first
        index = torch.cat(places).to(rows[0].device)
        self.register_buffer("weights", torch.cat(weights), persistent=False)
        self.register_buffer("rows", torch.cat(rows), persistent=False)
        self.register_buffer("index", index, persistent=False)
        divisor = linears[0].get("input_global_scale")
        others = [linear.get("input_global_scale") for linear in linears[1:]]
        if divisor is not None and not all(d is not None and d.equal(divisor) for d in others):
            raise QuantkitError("linears that share an input have different input_global_scale")
        self.register_buffer("divisor", divisor, persistent=False)
        channels = keep = branch = None
        self.columns = 0
        if work.branch:
            listed = linears[0]["outlier_index"]
            self.columns = len(listed)
            channels, keep = listed[listed >= 0].long(), sm90.outlier_mask(listed, work.width)
            branch = pad(listed.int(), (0, -len(listed) % BRANCH_COLUMNS[work.branch]), value=-1)
        self.register_buffer("channels", channels, persistent=False)
        self.register_buffer("keep", keep, persistent=False)
        self.register_buffer("outlier_index", branch, persistent=False)
        self.has_kernel = self.recipe.has_kernel(divisor)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantize(x), x.dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        """forward(silu(gate) * up) of gate_up [M, 2 K]; the kernel keeps that product to itself."""
        return self.multiply(*self.quantize(gate_up, gated=True), gate_up.dtype)

    def normed(self, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        """forward(x / rms(x) * gain); the kernel keeps that product to itself."""
        return self.multiply(*self.quantize(x, norm=(gain, epsilon)), x.dtype)

    def quantize(
        self, x: Tensor, gated: bool = False, norm: tuple[Tensor, float] | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """x [M, K] (gated: [M, 2 K]; `norm`: gain and epsilon): token tiles, token scales, M."""
        recipe, divisor = self.recipe, self.divisor
        if self.has_kernel and on_gpu(x) and x.dtype in activation.DTYPES:
            if norm is not None and self.width > activation.MOST_NORMED:
                x, norm = activation.source_by_torch(x, False, norm), None
            gain, epsilon = norm or (None, 0.0)
            tokens, scales = activation.quantize_tokens(
                x,
                self.keep,
                self.outlier_index,
                divisor,
                recipe.activations,
                recipe.rule,
                recipe.branch == "fp8",
                recipe.hadamard,
                gated,
                gain,
                epsilon,
            )
            return tokens, scales, len(x)
        x = activation.source_by_torch(x, gated, norm)
        tokens, scales = activation.by_torch(x, recipe, self.channels, self.columns, divisor)
        return tokens, scales, len(x)

    def multiply(
        self, tokens: Tensor, scales: Tensor, count: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """What `quantize` gave times the weights, plus bias: [M, N] in `dtype`."""
        y = sm90.gemm(
            tokens,
            scales,
            self.weights,
            self.rows,
            self.width,
            self.form,
            self.branch,
            count,
            self.outputs,
            dtype,
        )
        return y if len(self.index) == self.outputs else y[:, self.index]


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can read x."""
    return x.is_cuda
