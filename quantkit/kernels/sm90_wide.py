"""Packed linears on Hopper that FP8 cannot multiply exactly: in bfloat16 `wgmma`.

NVFP4 x NVFP4, and MXFP4 or MXFP8 weights beside MXFP8 activations. Weights stay packed in memory
and are decoded in registers; activations are quantized by torch operations and laid out as
bfloat16 tiles. The main loop and its schedules are those of `sm90_gemm.cuh`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quantkit.formats import e2m1, nvfp4
from quantkit.kernels import jit, reference, sm90, sm90_tiles
from quantkit.kernels.capability import Kernel
from quantkit.kernels.prepare_wide import COLUMNS, prepare_fp4, prepare_mxfp8

if TYPE_CHECKING:
    from quantkit.kernels.dispatch import Work

FORMS = {"nvfp4": "fp4 in bf16", "mxfp4": "fp4 in bf16", "mxfp8": "mxfp8 in bf16"}


def refuse(kernel: Kernel, work: Work) -> str | None:
    """Say why these shapes or options cannot run, None when they can."""
    if work.hadamard:
        return f"{kernel.name} has no online Hadamard"
    if work.width % 32:
        return f"{kernel.name} needs a width that is a multiple of 32, not {work.width}"
    return None


def prepare(kernel: Kernel, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Stack the linears of a site in execution layout; compile what one token needs."""
    tile = sm90_tiles.plan(sum(work.outputs), work.width, 1).tile
    jit.compile(sm90_tiles.gemm_text(tile, FORMS[work.weights], None), "sm90_gemm", sm90.ARCH)
    layer = WideLinear(work, linears)
    device = layer.rows.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        sm90.reserve(device)
    return layer


class WideLinear(nn.Module):
    """Computes [M, sum(outputs)] of x [M, K]; buffers hold the execution layout."""

    weights: Tensor
    rows: Tensor
    index: Tensor
    divisor: Tensor | None

    def __init__(self, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.activations, self.rule = work.activations, work.rule
        self.width, self.form = work.width, FORMS[work.weights]
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
        self.register_buffer("divisor", linears[0].get("input_global_scale"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantize(x), x.dtype)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """x [M, K]: token tiles, token scales, M."""
        factor = x.new_ones(1, dtype=torch.float32)
        if self.activations == "nvfp4":
            # Without its divisor a value is exact in bfloat16; with it, in general, it is not.
            packed, scale, divisor = nvfp4.quantize(x, self.divisor)
            values = e2m1.decode_packed(packed).unflatten(-1, (-1, nvfp4.BLOCK))
            values = (values * scale.float()[..., None]).flatten(-2)
            factor = 1 / divisor.float().reshape(1)
        else:
            values = reference.quantize_activations(x.float(), self.activations, self.rule, None)
        tokens = tiles_of(values.to(torch.bfloat16))
        size = sm90_tiles.token_tile(len(x))
        scales = torch.stack([factor, torch.ones_like(factor)], 1).repeat(len(tokens) * size, 1)
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
            None,
            count,
            self.outputs,
            dtype,
        )
        return y if len(self.index) == self.outputs else y[:, self.index]


def tiles_of(x: Tensor) -> Tensor:
    """x bfloat16 [M, K] as the kernel's token tiles [tiles, bytes], 128-byte swizzled."""
    size = sm90_tiles.token_tile(len(x))
    x = pad(x, (0, -x.shape[1] % COLUMNS, 0, -len(x) % size))
    chunks = x.reshape(-1, size, x.shape[1] // COLUMNS, 8, 8).transpose(1, 2)  # of 16 bytes
    row = torch.arange(size, device=x.device)[:, None]
    place = torch.arange(8, device=x.device)[None] ^ row % 8
    return chunks[:, :, row, place].reshape(len(chunks), -1).view(torch.uint8)
