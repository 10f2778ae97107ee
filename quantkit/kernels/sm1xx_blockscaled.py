"""Packed linears on Blackwell: block-scaled FP4/FP8 MMA, the 16-bit branch added before rounding.

The execution layout is the checkpoint's packed weight as it is, with the block scales reordered
into 128x4 tiles (`scale_layout`). Activations are quantized by `sm1xx_quantize_act.cuh`, the
product computed by `sm100_` or `sm120_blockscaled_gemm.cuh`; the branch's FP32 product (cuBLAS)
is the GEMM's C operand. Compiled for sm_100a and sm_120a; not run on that hardware.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.formats import e8m0
from quantkit.formats.element import E2M1, E4M3
from quantkit.kernels import generate, jit
from quantkit.kernels.capability import KERNELS, Kernel
from quantkit.kernels.scale_layout import tile_bytes, to_tiles

if TYPE_CHECKING:
    from quantkit.kernels.dispatch import Work

BLOCK = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
RULES = ("floor", "even", "even4", "ceil", "rceil")
_OUTPUT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class GemmArguments(ctypes.Structure):
    """`quantkit::GemmArguments` of `sm1xx_blockscaled_gemm.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("output", "weights", "weight_scales", "tokens")),
        *((name, ctypes.c_void_p) for name in ("token_scales", "row_scale", "token_scale")),
        *((name, ctypes.c_void_p) for name in ("bias", "branch")),
        *((name, ctypes.c_int) for name in ("outputs", "token_count", "k")),
    )


class QuantizeArguments(ctypes.Structure):
    """`quantkit::QuantizeArguments` of `sm1xx_quantize_act.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "mask", "index", "divisor", "codes")),
        *((name, ctypes.c_void_p) for name in ("scales", "gathered")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("tokens", "k", "outliers", "carry")),
    )


def refuse(kernel: Kernel, work: Work) -> str | None:
    """Say why these shapes or options cannot run, None when they can."""
    if work.dtype == torch.float32:
        return f"{kernel.name} takes no float32, as the residual branch of a rotated input is"
    widened = work.weights != work.activations  # TMA widens the 4-bit operand beside an 8-bit one
    multiple = 128 if widened else 32
    if work.width % multiple:
        return f"{kernel.name} needs a width that is a multiple of {multiple}, not {work.width}"
    if sum(work.outputs) % 8:
        return f"{kernel.name} needs a multiple of 8 outputs, not {sum(work.outputs)}"
    if work.activations != "nvfp4" and work.rule not in RULES:
        return f"{kernel.name} has no scale rule {work.rule!r} for activations"
    if work.hadamard and (work.hadamard.get("block") != 32 or work.activations == "nvfp4"):
        return f"{kernel.name} rotates activations in blocks of 32 only, not {work.hadamard}"
    return None


def prepare(kernel: Kernel, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Join the linears of a site and reorder their scales; compile what a few tokens need.

    Raises MissingCompiler or CompileError here rather than in the first forward. Other tiles are
    compiled when the first batch needs them.
    """
    dtype = _OUTPUT[work.dtype]
    tile = generate.blockscaled_tile(kernel, 1)
    for source in (
        generate.quantize_act(kernel.arch, work.activations, dtype, work.hadamard is not None),
        generate.blockscaled_gemm(kernel, tile, dtype, work.branch is not None),
    ):
        jit.compile(source.text, source.name, source.arch)
    return BlockScaledLinear(kernel, work, linears)


class BlockScaledLinear(nn.Module):
    """Computes [M, sum(outputs)] of x [M, K]; buffers hold the execution layout."""

    codes: Tensor
    scales: Tensor
    row_scale: Tensor | None
    bias: Tensor | None
    index: Tensor | None
    mask: Tensor | None
    outlier_weight: Tensor | None
    divisor: Tensor | None

    def __init__(self, kernel: Kernel, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.row = KERNELS.index(kernel)
        self.activations, self.branch, self.rule = work.activations, work.branch, work.rule
        self.rotate = work.hadamard is not None
        name = "weight" if work.weights == "mxfp8" else "weight_packed"
        codes = torch.cat([linear[name].view(torch.uint8) for linear in linears])
        scales = torch.cat([linear["weight_scale"].view(torch.uint8) for linear in linears])
        self._keep("codes", codes)
        self._keep("scales", to_tiles(scales))
        self._keep("row_scale", _row_scale(linears) if work.weights == "nvfp4" else None)
        self._keep("bias", _bias(linears))
        self._keep("divisor", _input_divisor(linears) if work.activations == "nvfp4" else None)
        index = mask = outlier_weight = None
        if work.branch is not None:
            index = linears[0]["outlier_index"].to(torch.int32)
            mask = channel_mask(index, work.width)
            outlier_weight = torch.cat([_outlier_weight(linear) for linear in linears])
        self._keep("index", index)
        self._keep("mask", mask)
        self._keep("outlier_weight", outlier_weight)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantize(x), x.dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        """forward(silu(gate) * up) of gate_up [M, 2 K] without that product in memory."""
        return self.multiply(*self.quantize(gate_up, gated=True), gate_up.dtype)

    def quantize(self, x: Tensor, gated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x [M, K] (gated: [M, 2 K]): codes, scale tiles and gathered outlier channels."""
        return quantize_activations(
            x, self.activations, self.rule, self.rotate, gated, self.index, self.mask, self.divisor
        )

    def multiply(
        self, codes: Tensor, scales: Tensor, gathered: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """What `quantize` gave times the weights, plus branch and bias: [M, N] in `dtype`."""
        branch = None
        if self.outlier_weight is not None:
            branch = self._branch(gathered, self.outlier_weight)
        token_scale = None
        if self.divisor is not None:
            token_scale = self.divisor.reciprocal().expand(len(codes)).contiguous()
        return gemm(
            codes,
            scales,
            token_scale,
            self.codes,
            self.scales,
            self.row_scale,
            branch,
            self.bias,
            self.row,
            dtype,
        )

    def _branch(self, gathered: Tensor, weight: Tensor) -> Tensor:
        """The branch's product [M, N] in float32."""
        if self.branch == "fp8":
            from quantkit.kernels.reference import branch_input
            from quantkit.pack.scheme import SiteFormat

            gathered = branch_input(gathered, SiteFormat("none", "none", "fp8"))
        # float16 cannot hold what bfloat16 does, and only CUDA multiplies into float32.
        if gathered.dtype != weight.dtype or not gathered.is_cuda:
            return gathered.float() @ weight.float().T
        return torch.mm(gathered, weight.T, out_dtype=torch.float32)


def channel_mask(index: Tensor, width: int) -> Tensor:
    """One bit a channel, set for outliers: int32 [ceil(width / 32)], bit c % 32 of word c / 32."""
    bits = torch.zeros(-(-width // 32) * 32, dtype=torch.int64, device=index.device)
    bits[index[index >= 0].long()] = 1
    words = (bits.unflatten(0, (-1, 32)) << torch.arange(32, device=index.device)).sum(-1)
    return words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


def _row_scale(linears: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """One over the weight's NVFP4 divisor for every output, float32."""
    return torch.cat(
        [
            linear["weight_global_scale"].float().reciprocal().expand(len(linear["weight_scale"]))
            for linear in linears
        ]
    ).contiguous()


def _bias(linears: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    biases = [linear.get("bias") for linear in linears]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    return torch.cat(
        [
            given.new_zeros(len(linear["weight_scale"])) if bias is None else bias
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )


def _input_divisor(linears: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The site's NVFP4 input divisor, float32 [1]; QuantkitError when its linears disagree."""
    first = linears[0]["input_global_scale"].float().reshape(1)
    if any(not torch.equal(linear["input_global_scale"].float(), first) for linear in linears[1:]):
        raise QuantkitError("linears that share an input have different input_global_scale")
    return first


def _outlier_weight(linear: Mapping[str, Tensor]) -> Tensor:
    """The branch's weight [out, k] in bfloat16; an FP8 one multiplied by its row scales."""
    weight = linear["outlier_weight"].to(torch.bfloat16)
    scale = linear.get("outlier_weight_scale")
    return weight if scale is None else weight * scale.to(torch.bfloat16)


@torch.library.custom_op("quantkit::sm1xx_quantize_act", mutates_args=())
def quantize_activations(
    x: Tensor,
    activations: str,
    rule: str,
    rotate: bool,
    gated: bool,
    index: Tensor | None,
    mask: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [M, K]: codes [M, K/2] or [M, K], scale tiles, and gathered outliers [M, k].

    `gated`: x [M, 2 K] holds gate and up, and silu(gate) * up is quantized.
    """
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # rows are read 16 bytes at a time
        x = x.clone(memory_format=torch.contiguous_format)
    codes, scales, gathered = _allocate(x, activations, index, gated)
    if len(x) == 0:
        return codes, scales, gathered
    args = quantize_arguments(
        x, rule, activations, gated, index, mask, divisor, codes, scales, gathered
    )
    source = generate.quantize_act(_arch(x), activations, _OUTPUT[x.dtype], rotate, gated)
    library = jit.load(source.text, source.name, source.arch)
    _check(library.run(ctypes.byref(args), _stream(x)), source.name)
    return codes, scales, gathered


@quantize_activations.register_fake
def _(
    x: Tensor,
    activations: str,
    rule: str,
    rotate: bool,
    gated: bool,
    index: Tensor | None,
    mask: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(x, activations, index, gated)


def _allocate(
    x: Tensor, activations: str, index: Tensor | None, gated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    columns = width if activations == "mxfp8" else width // 2
    size = tile_bytes(tokens, width // BLOCK[activations])
    outliers = 0 if index is None else len(index)
    return (
        x.new_empty(tokens, columns, dtype=torch.uint8),
        x.new_empty(size, dtype=torch.uint8),
        x.new_empty(tokens, outliers),
    )


def quantize_arguments(
    x: Tensor,
    rule: str,
    activations: str,
    gated: bool,
    index: Tensor | None,
    mask: Tensor | None,
    divisor: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    gathered: Tensor,
) -> QuantizeArguments:
    """The C structure of a call; x has unit stride along channels and 16-byte aligned rows."""
    element = E4M3 if activations == "mxfp8" else E2M1
    return QuantizeArguments(
        x=x.data_ptr(),
        mask=_pointer(mask),
        index=_pointer(index),
        divisor=_pointer(divisor),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        gathered=gathered.data_ptr(),
        stride=x.stride(0),
        tokens=len(x),
        k=x.shape[1] // (2 if gated else 1),
        outliers=gathered.shape[1],
        carry=0 if activations == "nvfp4" else e8m0.carry(element, rule),
    )


@torch.library.custom_op("quantkit::sm1xx_blockscaled_gemm", mutates_args=())
def gemm(
    x: Tensor,
    x_scales: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    kernel: int,
    dtype: torch.dtype,
) -> Tensor:
    """x [M, K] times weight [N, K], both packed with scale tiles: [M, N] in `dtype`.

    `kernel` is the row of the capability table; `branch` float32 [M, N] and `bias` [N] are added
    before the result is rounded.
    """
    row = KERNELS[kernel]
    out = x.new_empty(len(x), len(weight), dtype=dtype)
    if len(x) == 0:
        return out
    tile = generate.blockscaled_tile(row, len(x))
    source = generate.blockscaled_gemm(row, tile, _OUTPUT[dtype], branch is not None)
    library = jit.load(source.text, source.name, source.arch)
    library.workspace_bytes.restype = ctypes.c_int64
    bias = None if bias is None else bias.to(dtype)
    args = GemmArguments(
        output=out.data_ptr(),
        weights=weight.data_ptr(),
        weight_scales=weight_scales.data_ptr(),
        tokens=x.data_ptr(),
        token_scales=x_scales.data_ptr(),
        row_scale=_pointer(row_scale),
        token_scale=_pointer(token_scale),
        bias=_pointer(bias),
        branch=_pointer(branch),
        outputs=len(weight),
        token_count=len(x),
        k=weight.shape[1] * (1 if row.weights == "mxfp8" else 2),
    )
    workspace = x.new_empty(library.workspace_bytes(ctypes.byref(args)), dtype=torch.uint8)
    status = library.run(ctypes.byref(args), _pointer(workspace), _stream(x))
    _check(status, source.name)
    return out


@gemm.register_fake
def _(
    x: Tensor,
    x_scales: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    kernel: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=dtype)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _stream(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)


def _arch(x: Tensor) -> str:
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}a"


def _check(status: int, name: str) -> None:
    if status >= 100:
        raise QuantkitError(f"kernel {name} failed to launch: CUDA error {status - 100}")
    if status:
        raise QuantkitError(f"kernel {name} refused its arguments: CUTLASS status {status}")
