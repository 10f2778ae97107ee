"""The packed arithmetic in plain torch: what every kernel is checked against, on any device.

    Y = Q(H x_rest) Q(H W_rest)^T + x_out W_out^T

The dequantized operands of the MX formats are exact in bfloat16 (and so are those of NVFP4 under
a power-of-two divisor), so one GEMM in bfloat16 with float32 accumulation is the exact product of
the packed numbers, rounded once. The branch runs in the same GEMM: without an online Hadamard its
columns take their own, emptied places in both operands; with one they are appended.

A residual branch leaves the channels S where they are and appends what their rounding lost, in the
same format (ARCQuant, 2601.07475): Z = H x, R = (Z - Q(Z))[S] in the dtype of Z, and

    Y = [Q(Z), Q(R)] W^T,  W [out, in + k] one packed weight
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.formats.e8m0 import decode, power_of_two, scale_exponent
from quantkit.formats.element import E4M3, round_to_element
from quantkit.pack.layout import channels_of
from quantkit.pack.scheme import SiteFormat


def packed_linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    fmt: SiteFormat,
    rule: str,
    bias: Tensor | None = None,
) -> Tensor:
    """A packed linear on x [.., in]: [.., out] in the dtype of x.

    `tensors`: the names of pack/layout.py.
    """
    weight = weight_operand(tensors, fmt, compute_dtype(x.dtype))
    operand = input_operand(x, fmt, rule, channels_of(tensors), tensors.get("input_global_scale"))
    return linear(operand, weight, bias, x.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype operands are held in: that of the input, float32 when it is float16.

    float16 cannot hold the range of the block scales.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def linear(operand: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The GEMM of the operands below; `bias` is cast to theirs, the result to `dtype`."""
    bias = None if bias is None else bias.to(operand.dtype)
    return functional.linear(operand, weight, bias).to(dtype)


def dequantized_weight(
    tensors: Mapping[str, Tensor], fmt: SiteFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The main path's weight [out, in] as its bytes say: no branch, Hadamard not undone."""
    if fmt.weights == "none":
        return tensors["weight"].to(dtype)
    if fmt.weights == "mxfp8":
        return mxfp8.dequantize(tensors["weight"], tensors["weight_scale"], dtype)
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    if fmt.weights == "mxfp4":
        return mxfp4.dequantize(packed, scale, dtype)
    return nvfp4.dequantize(packed, scale, tensors["weight_global_scale"], dtype)


def weight_operand(tensors: Mapping[str, Tensor], fmt: SiteFormat, dtype: torch.dtype) -> Tensor:
    """Weights for one GEMM: [out, in] with the branch's columns in place, or [out, in + k]."""
    return with_branch(dequantized_weight(tensors, fmt, dtype), tensors, fmt)


def with_branch(weight: Tensor, tensors: Mapping[str, Tensor], fmt: SiteFormat) -> Tensor:
    """The main path's weight [out, in], as float, completed by the branch among `tensors`.

    The columns of a residual branch are in it already.
    """
    channels, dtype = channels_of(tensors), weight.dtype
    if fmt.branch in (None, "residual") or channels is None:
        return weight
    branch = branch_weight(tensors, fmt, dtype)[:, : len(channels)]
    if fmt.hadamard_size:
        return torch.cat([weight, branch], dim=1)
    return weight.index_copy(1, channels, branch)


def branch_weight(tensors: Mapping[str, Tensor], fmt: SiteFormat, dtype: torch.dtype) -> Tensor:
    """The branch's weight [out, k], padding included, as its bytes say."""
    branch = tensors["outlier_weight"].to(dtype)
    if fmt.branch == "fp8":
        scale = tensors["outlier_weight_scale"]  # E8M0 in files, float32 as kernels take them
        branch = branch * (scale if scale.dtype == torch.float32 else decode(scale)).to(dtype)
    return branch


def input_operand(
    x: Tensor,
    fmt: SiteFormat,
    rule: str,
    channels: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Inputs for one GEMM with `weight_operand`: x [.., in] with its rest quantized.

    `channels` are the separated ones (int64), or those of a residual branch; `divisor` the input's
    global scale (NVFP4).
    """
    dtype = compute_dtype(x.dtype)
    if fmt.branch == "residual" and channels is not None:
        z = _rotated(x, fmt)
        main = quantize_activations(z, fmt.activations, rule, divisor)
        lost = residual(z, main, channels, fmt.outliers)
        lost = quantize_activations(lost, fmt.activations, rule, divisor)
        return torch.cat([main.to(dtype), lost.to(dtype)], dim=-1)
    if fmt.branch is None or channels is None:
        return _quantized_rest(x, fmt, rule, divisor, dtype)
    branch = branch_input(x.index_select(-1, channels), fmt).to(dtype)
    rest = x.index_fill(-1, channels, 0)  # zeroed before any block scale is taken
    rest = _quantized_rest(rest, fmt, rule, divisor, dtype)
    if fmt.hadamard_size:
        return torch.cat([rest, branch], dim=-1)
    return rest.index_copy_(-1, channels, branch)


def _quantized_rest(
    x: Tensor, fmt: SiteFormat, rule: str, divisor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return quantize_activations(_rotated(x, fmt), fmt.activations, rule, divisor).to(dtype)


def _rotated(x: Tensor, fmt: SiteFormat) -> Tensor:
    if not fmt.hadamard_size:
        return x
    from quantkit.transforms.hadamard import rotate

    return rotate(x.to(torch.promote_types(x.dtype, torch.float32)), fmt.hadamard_size)


def residual(x: Tensor, quantized: Tensor, channels: Tensor, columns: int) -> Tensor:
    """What quantization lost of `channels` of x [.., in]: [.., columns] in x's dtype.

    Zeros behind the channels. The difference is exact in the dtype of x unless x was clipped: it
    is a multiple of x's last bit, and no larger than x.
    """
    lost = (x - quantized).index_select(-1, channels)
    return functional.pad(lost, (0, columns - len(channels)))


def quantize_activations(x: Tensor, name: str, rule: str, divisor: Tensor | None) -> Tensor:
    """Round x [.., in] to format `name` and back, in the dtype of x; `none` leaves it."""
    if name == "mxfp4":
        return mxfp4.fake_quantize(x, rule)
    if name == "mxfp8":
        return mxfp8.fake_quantize(x, rule)
    if name == "nvfp4":
        return nvfp4.fake_quantize(x, divisor)
    return x


def branch_input(x: Tensor, fmt: SiteFormat) -> Tensor:
    """The separated channels [.., k] as the branch multiplies them.

    bf16: as they are. fp8: E4M3 under one power-of-two scale per token (even rule).
    """
    if fmt.branch != "fp8" or x.shape[-1] == 0:
        return x
    values, scale = fp8_tokens(x)
    return (values * scale).to(x.dtype)


def fp8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Separated channels [.., k] for an FP8 branch: E4M3 values as float32, scales [.., 1]."""
    exponent = scale_exponent(x.abs().amax(-1, keepdim=True), E4M3, "even").clamp(-126, 126)
    scale = power_of_two(exponent)
    return round_to_element(x.float() / scale, E4M3), scale
