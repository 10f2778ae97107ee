"""Packed linears on Hopper: MXFP4 x MXFP4 with block scales, exact, on the FP8 tensor cores.

Weights stay 4-bit and are decoded in registers (`sm90_gemm.cuh`), activations are quantized by the
checkpoint's rule and folded to FP8 (`sm90_activation.cuh`); the layout of both is `prepare`'s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError
from quantkit.formats import e8m0
from quantkit.formats.element import E2M1
from quantkit.kernels import jit, sm90_tiles
from quantkit.kernels.capability import Kernel
from quantkit.kernels.prepare import BRANCH_COLUMNS, COLUMNS, ROWS, Prepared, prepare_mxfp4

if TYPE_CHECKING:
    from quantkit.kernels.dispatch import Work

ARCH = "sm_90a"
ROTATIONS = (32, 64, 128, 256, 512)  # of the online block Hadamard
MOST_OUTLIERS = 16384  # of a site: the activation kernel keeps a token's in shared memory
OVERLAP = True  # launches start while the kernel before ends (programmatic dependent launch)
OUTPUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # numbered as in sm90_epilogue.cuh


class GemmArguments(ctypes.Structure):
    """`Arguments` of `sm90_epilogue.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "tokens", "rows", "token_scales")),
        *((name, ctypes.c_void_p) for name in ("out", "partials", "flags")),
        ("token_tile_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("m", "n", "row_blocks", "row_tiles", "token_tiles")),
        *((name, ctypes.c_int) for name in ("bricks", "branch_bricks", "split", "ahead")),
        ("out_type", ctypes.c_int),
    )


class ActivationArguments(ctypes.Structure):
    """`ActivationArguments` of `sm90_activation.cuh`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "gain", "keep", "outlier_index", "tokens")),
        ("token_scales", ctypes.c_void_p),
        ("token_tile_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("m", "k", "tile", "bricks", "branch_columns")),
        *((name, ctypes.c_int) for name in ("branch_fp8", "carry", "hadamard")),
        ("gated", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    )


def refuse(kernel: Kernel, work: Work) -> str | None:
    """Say why these shapes or options cannot run, None when they can."""
    if work.dtype == torch.float32:
        return f"{kernel.name} takes no float32, as the residual branch of a rotated input is"
    if work.width % 32:
        return f"{kernel.name} needs a width that is a multiple of 32, not {work.width}"
    if work.rule == "mse":  # which tries three exponents a block
        return f"{kernel.name} has no scale rule {work.rule!r} for activations"
    if work.width > 65536:
        return f"{kernel.name} takes at most 65536 input channels, not {work.width}"
    if work.outliers > MOST_OUTLIERS:
        return f"{kernel.name} takes at most {MOST_OUTLIERS} outlier channels, not {work.outliers}"
    if work.hadamard:
        size = next(iter(work.hadamard.values()))
        if size not in ROTATIONS:
            return f"{kernel.name} rotates activations in blocks of 32 to 512, not {size}"
    return None


def prepare(kernel: Kernel, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Stack the linears of a site in execution layout; compile what one token needs.

    Raises MissingCompiler or CompileError here rather than in the first forward. Other tiles are
    compiled when the first batch needs them.
    """
    dtype = "bf16" if work.dtype == torch.bfloat16 else "fp16"
    jit.compile(sm90_tiles.activation_text(dtype), "sm90_activation", ARCH)
    tile = sm90_tiles.plan(sum(work.outputs), work.width, 1).tile
    jit.compile(sm90_tiles.gemm_text(tile, work.weights, work.branch), "sm90_gemm", ARCH)
    layer = ExactFoldLinear(work, linears)
    device = layer.weights_of(0).device
    if device.type == "cuda":
        # A GEMM fetches weights before the kernels in front of it are done (programmatic launch).
        torch.cuda.synchronize(device)
        reserve(device)
    return layer


class ExactFoldLinear(nn.Module):
    """Computes [M, sum(outputs)] of x [M, K]; buffers hold the execution layout."""

    keep: Tensor | None
    outlier_index: Tensor | None

    def __init__(self, work: Work, linears: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        prepared = stack(work, linears)
        self.weights, self.branch = work.weights, work.branch
        self.width, self.outputs = work.width, prepared.out_features
        self.carry = e8m0.carry(E2M1, work.rule)
        self.hadamard = next(iter(work.hadamard.values())) if work.hadamard else 0
        self.planes = len(prepared.planes)
        for i, plane in enumerate(prepared.planes):
            self.register_buffer(f"weights{i}", plane.weights, persistent=False)
            self.register_buffer(f"rows{i}", plane.rows, persistent=False)
            self.register_buffer(f"index{i}", plane.index, persistent=False)
        keep = None
        if prepared.outlier_index is not None:
            keep = outlier_mask(prepared.outlier_index, work.width)
        self.register_buffer("keep", keep, persistent=False)
        self.register_buffer("outlier_index", prepared.outlier_index, persistent=False)

    def weights_of(self, plane: int) -> Tensor:
        """Bricks of a plane."""
        return self.get_buffer(f"weights{plane}")

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantize(x), x.dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        """forward(silu(gate) * up) of gate_up [M, 2 K] without that product in memory."""
        return self.multiply(*self.quantize(gate_up, gated=True), gate_up.dtype)

    def normed(self, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        """forward(x / rms(x) * gain) without that product in memory; see `quantize_tokens`."""
        return self.multiply(*self.quantize(x, norm=(gain, epsilon)), x.dtype)

    def quantize(
        self, x: Tensor, gated: bool = False, norm: tuple[Tensor, float] | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """x [M, K] (gated: [M, 2 K]; `norm`: gain and epsilon): token tiles, token scales, M."""
        gain, epsilon = norm or (None, 0.0)
        fp8 = self.branch == "fp8"
        tokens, scales = quantize_tokens(
            x, self.keep, self.outlier_index, fp8, self.carry, self.hadamard, gated, gain, epsilon
        )
        return tokens, scales, len(x)

    def multiply(
        self, tokens: Tensor, scales: Tensor, count: int, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """What `quantize` gave times the weights, plus branch and bias: [M, N] in `dtype`."""

        def product(i: int, branch: str | None, outputs: int, kind: torch.dtype) -> Tensor:
            weights, rows = self.weights_of(i), self.get_buffer(f"rows{i}")
            return gemm(
                tokens,
                scales,
                weights,
                rows,
                self.width,
                self.weights,
                branch,
                count,
                outputs,
                kind,
            )

        if self.planes == 1:
            return product(0, self.branch, self.outputs, dtype)
        total = product(0, self.branch, self.outputs, torch.float32)
        for i in range(1, self.planes):
            index = self.get_buffer(f"index{i}")
            total.index_add_(1, index, product(i, None, len(index), torch.float32))
        return total.to(dtype)


def stack(work: Work, linears: Sequence[Mapping[str, Tensor]]) -> Prepared:
    """Lay out linears that share their input as one, rows in order."""

    def join(name: str) -> Tensor | None:
        return torch.cat([linear[name] for linear in linears]) if name in linears[0] else None

    bias = None
    if any(linear.get("bias") is not None for linear in linears):
        bias = torch.cat([_bias(linear) for linear in linears])
    packed, scale = join("weight_packed"), join("weight_scale")
    assert packed is not None
    assert scale is not None
    if work.branch is None:
        return prepare_mxfp4(packed, scale, bias=bias)
    return prepare_mxfp4(
        packed,
        scale,
        bias=bias,
        outlier_weight=join("outlier_weight"),
        outlier_scale=join("outlier_weight_scale"),
        outlier_index=linears[0]["outlier_index"],
    )


def _bias(linear: Mapping[str, Tensor]) -> Tensor:
    bias = linear.get("bias")
    return (
        linear["weight_scale"].new_zeros(len(linear["weight_scale"])).float()
        if bias is None
        else bias.float()
    )


def outlier_mask(index: Tensor, width: int) -> Tensor:
    """16 bits a channel, int16 [width]: zero for outliers, all ones for what stays."""
    keep = torch.full((width,), -1, dtype=torch.int16, device=index.device)
    keep[index[index >= 0].long()] = 0
    return keep


def aligned(x: Tensor) -> Tensor:
    """x as the activation kernels read it: contiguous, 16 bytes at a time."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def allocate(
    x: Tensor, index: Tensor | None, fp8: bool, gated: bool, columns: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """Memory for token tiles [tiles, bytes] and token scales float32 [tokens, 2] of x.

    A tile has 128 bytes a token and main brick (of `columns`), 64 a token and branch brick.
    """
    width = x.shape[1] // 2 if gated else x.shape[1]
    branch = 0 if index is None else len(index) // BRANCH_COLUMNS["fp8" if fp8 else "bf16"]
    tile = sm90_tiles.token_tile(len(x))
    tiles = -(-len(x) // tile)
    return (
        x.new_empty(tiles, tile * (-(-width // columns) * 128 + branch * 64), dtype=torch.uint8),
        x.new_empty(tiles * tile, 2, dtype=torch.float32),
    )


@torch.library.custom_op("quantkit::sm90_quantize", mutates_args=())
def quantize_tokens(
    x: Tensor,
    keep: Tensor | None,
    index: Tensor | None,
    fp8: bool,
    carry: int,
    hadamard: int,
    gated: bool,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] into token tiles [tiles, bytes] and token scales float32 [tokens, 2].

    `index` are the branch's channels, `keep` the mask of the others; `fp8` says the branch's type.
    `gated`: x [M, 2 K] holds gate and up, and silu(gate) * up is quantized. `gain` [K]: what is
    quantized is gain * round(x * rsqrt(mean(x^2) + epsilon)), as transformers' LlamaRMSNorm rounds:
    the mean and the first product in float32, to x's type before the gain and after it. Only the
    order in which the squares are added is this kernel's own.
    """
    x, gain = aligned(x), None if gain is None else aligned(gain)
    tokens, scales = allocate(x, index, fp8, gated)
    if len(x) == 0:
        return tokens, scales
    width = x.shape[1] // 2 if gated else x.shape[1]
    args = ActivationArguments(
        x=x.data_ptr(),
        gain=None if gain is None else gain.data_ptr(),
        keep=None if keep is None else keep.data_ptr(),
        outlier_index=None if index is None else index.data_ptr(),
        tokens=tokens.data_ptr(),
        token_scales=scales.data_ptr(),
        token_tile_bytes=tokens.shape[1],
        m=len(x),
        k=width,
        tile=sm90_tiles.token_tile(len(x)),
        bricks=-(-width // COLUMNS),
        branch_columns=0 if index is None else len(index),
        branch_fp8=fp8,
        carry=carry,
        hadamard=hadamard,
        gated=gated,
        epsilon=epsilon,
    )
    dtype = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    library = jit.load(sm90_tiles.activation_text(dtype), "sm90_activation", ARCH)
    _check(library.run(ctypes.byref(args), int(OVERLAP), _stream(x)), "sm90_activation")
    return tokens, scales


@quantize_tokens.register_fake
def _(
    x: Tensor,
    keep: Tensor | None,
    index: Tensor | None,
    fp8: bool,
    carry: int,
    hadamard: int,
    gated: bool,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return allocate(x, index, fp8, gated)


@torch.library.custom_op("quantkit::sm90_gemm", mutates_args=())
def gemm(
    tokens: Tensor,
    scales: Tensor,
    weights: Tensor,
    rows: Tensor,
    width: int,
    form: str,
    branch: str | None,
    count: int,
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """Token tiles of `count` tokens times `weights` [row blocks, ...]: [count, outputs].

    `rows` are the row constants of `prepare.Plane`, `form` the weight format, `width` K.
    """
    out = tokens.new_empty(count, outputs, dtype=dtype)
    if count == 0:
        return out
    plan = sm90_tiles.plan(outputs, width, count, _multiprocessors(tokens.device.index))
    tile = plan.tile if dtype == torch.bfloat16 else sm90_tiles.careful(plan.tile)
    sums = plan.ctas * tile.row_groups * ROWS * tile.tokens if plan.split else 0  # of parts
    partials = _partials(tokens, sums)
    flags = _flags_of_stream(tokens.device)
    bricks, branch_bricks = -(-width // sm90_tiles.BRICK_COLUMNS[form]), 0
    if branch is not None:
        branch_bricks = (tokens.shape[1] // plan.tile.tokens - 128 * bricks) // 64
    args = GemmArguments(
        weights=weights.data_ptr(),
        tokens=tokens.data_ptr(),
        rows=rows.data_ptr(),
        token_scales=scales.data_ptr(),
        out=out.data_ptr(),
        partials=partials.data_ptr(),
        flags=flags.data_ptr(),
        token_tile_bytes=tokens.shape[1],
        m=count,
        n=outputs,
        row_blocks=weights.shape[0],
        row_tiles=-(-weights.shape[0] // tile.row_groups),
        token_tiles=len(tokens),
        bricks=bricks,
        branch_bricks=branch_bricks,
        split=plan.split,
        ahead=2,
        out_type=OUTPUT_TYPES.index(dtype),
    )
    library = jit.load(sm90_tiles.gemm_text(tile, form, branch), "sm90_gemm", ARCH)
    status = library.run(ctypes.byref(args), plan.ctas, int(OVERLAP), _stream(tokens))
    _check(status, "sm90_gemm")
    return out


@gemm.register_fake
def _(
    tokens: Tensor,
    scales: Tensor,
    weights: Tensor,
    rows: Tensor,
    width: int,
    form: str,
    branch: str | None,
    count: int,
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    return tokens.new_empty(count, outputs, dtype=dtype)


STREAMS = 256  # of a device that use kernels; torch itself hands out fewer
_flags: dict[int, Tensor] = {}  # by device: a row a stream, zero between launches
_rows: dict[tuple[int, int], Tensor] = {}  # by device and stream
_sms: dict[int, int] = {}


def reserve(device: torch.device) -> None:
    """Allocate the flags of split tiles ahead of their use.

    Inside the capture of a CUDA graph, and in the warm-up of those of torch.compile, a new tensor
    that stays would live in the graph's own memory.
    """
    if device.index not in _flags:
        shape = STREAMS, _multiprocessors(device.index)
        _flags[device.index] = torch.zeros(shape, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # other streams read them


def _partials(like: Tensor, sums: int) -> Tensor:
    return like.new_empty(sums, dtype=torch.float32)


def _flags_of_stream(device: torch.device) -> Tensor:
    """Flags of the current stream: launches of one stream follow one another."""
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    if key not in _rows:
        reserve(device)
        taken = sum(index == device.index for index, _ in _rows)
        if taken == STREAMS:
            raise QuantkitError(f"kernels ran on {STREAMS} streams of {device}; no flags are left")
        _rows[key] = _flags[device.index][taken]
    return _rows[key]


def _multiprocessors(device: int) -> int:
    if device not in _sms:
        _sms[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _sms[device]


def _stream(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)


def _check(status: int, name: str) -> None:
    if status:
        raise QuantkitError(f"kernel {name} failed to launch: CUDA error {status}")
