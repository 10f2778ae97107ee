"""Packed linears on Hopper that FP8 cannot multiply exactly: in bfloat16 `wgmma`.

NVFP4 x NVFP4, and MXFP4 or MXFP8 weights beside MXFP8 activations, with a branch in the same
launch. Weights stay packed in memory and are decoded in registers; activations are rotated and
quantized by torch operations, the reference's own, and laid out as bfloat16 tiles. The main loop
and its schedules are those of `sm90_gemm.cuh`.

A float16 input's bfloat16 branch is rounded to bfloat16, as in `sm90_activation.cuh`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quantkit.errors import QuantkitError
from quantkit.formats import FORMATS, nvfp4
from quantkit.kernels import jit, reference, sm90, sm90_tiles
from quantkit.kernels.capability import Kernel
from quantkit.kernels.prepare_wide import prepare_fp4, prepare_mxfp8
from quantkit.kernels.rotation import rotated

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

    def __init__(self, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.activations, self.rule = work.activations, work.rule
        self.width, self.form, self.branch = work.width, FORMS[work.weights], work.branch
        self.hadamard = next(iter(work.hadamard.values())) if work.hadamard else 0
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
        channels = None
        if work.branch:
            channels = linears[0]["outlier_index"]
            self.columns = len(channels)
            channels = channels[channels >= 0].long()
        self.register_buffer("channels", channels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantize(x), x.dtype)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """x [M, K]: token tiles, token scales, M."""
        factor, own = x.new_ones(2, 1, dtype=torch.float32)
        branch = None
        if self.channels is not None:
            branch = pad(x.index_select(1, self.channels), (0, self.columns - len(self.channels)))
            x = x.index_fill(1, self.channels, 0)  # no block scale sees them
            if self.branch == "fp8":
                branch, own = reference.fp8_tokens(branch)
                branch, own = branch.to(torch.float8_e4m3fn).view(torch.uint8), own[:, 0]
            else:
                branch = branch.to(torch.bfloat16)
        if self.hadamard > 1:
            x = rotated(x, self.hadamard)
        if self.activations == "nvfp4":
            # Without its divisor a value is exact in bfloat16; with it, in general, it is not.
            values, scale, divisor = nvfp4.elements(x, self.divisor)
            values = (values * scale[..., None]).flatten(-2)
            factor = 1 / divisor.float().reshape(1)
        else:
            values = reference.quantize_activations(x.float(), self.activations, self.rule, None)
        tokens = tiles_of(values.to(torch.bfloat16), 128)
        count = len(tokens) * sm90_tiles.token_tile(len(x))  # with padding
        if branch is not None:
            tokens = torch.cat([tokens, tiles_of(branch, 64)], 1)
            own = pad((own / factor).expand(len(x)), (0, count - len(x)))
        return tokens, torch.stack([factor.expand(count), own.expand(count)], 1), len(x)

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


def tiles_of(x: Tensor, row_bytes: int) -> Tensor:
    """x [M, K] as token tiles [tiles, bytes]: bricks of 128 or 64 bytes a token, swizzled."""
    size, chunk = sm90_tiles.token_tile(len(x)), 16 // x.element_size()  # of 16 bytes
    columns = row_bytes // 16 * chunk
    x = pad(x, (0, -x.shape[1] % columns, 0, -len(x) % size))
    chunks = x.reshape(len(x) // size, size, x.shape[1] // columns, row_bytes // 16, chunk)
    chunks = chunks.transpose(1, 2)
    row = torch.arange(size, device=x.device)[:, None]
    place = torch.arange(row_bytes // 16, device=x.device)[None]
    place = place ^ row * row_bytes // 128 % (row_bytes // 16)
    return chunks[:, :, row, place].flatten(1).view(torch.uint8)
