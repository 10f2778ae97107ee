"""The Blackwell module around its two device functions, these replaced by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.formats import e8m0, mxfp4, mxfp8, nvfp4
from quantkit.kernels import capability, dispatch, reference
from quantkit.kernels import sm1xx_blockscaled as blackwell
from quantkit.kernels.scale_layout import from_tiles, to_tiles
from quantkit.pack.layout import index_tensor
from quantkit.pack.scheme import SiteFormat

WIDTH, OUTPUTS, TOKENS = 256, (40, 24, 8), 5


def quantize(
    x: Tensor,
    activations: str,
    rule: str,
    rotate: bool,
    gated: bool,
    index: Tensor | None,
    mask: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What sm1xx_quantize_act.cuh computes (its bytes are compared elsewhere)."""
    gathered = x.new_zeros(len(x), 0)
    if gated:
        gate, up = x.chunk(2, dim=1)
        x = torch.nn.functional.silu(gate) * up
    rest = x
    if index is not None:
        assert mask is not None
        assert torch.equal(mask, blackwell.channel_mask(index, x.shape[1]))
        gathered = x[:, index.long().clamp(min=0)].where(index >= 0, 0)
        rest = x.index_fill(1, index[index >= 0].long(), 0)
    assert not rotate
    if activations == "nvfp4":
        codes, scales, _ = nvfp4.quantize(rest, divisor)
    else:
        codes, scales = (mxfp4 if activations == "mxfp4" else mxfp8).quantize(rest, rule)
    return codes.view(torch.uint8), to_tiles(scales), gathered


def values(codes: Tensor, tiles: Tensor, name: str) -> Tensor:
    """Codes and scale tiles to float64, as the MMA reads them: no tensor scale."""
    columns = codes.shape[1] * (1 if name == "mxfp8" else 2)
    scale = from_tiles(tiles, len(codes), columns // blackwell.BLOCK[name])
    if name == "mxfp8":
        return mxfp8.dequantize(codes.view(torch.float8_e4m3fn), scale).double()
    if name == "mxfp4":
        return mxfp4.dequantize(codes, scale).double()
    return nvfp4.dequantize(codes, scale.view(torch.float8_e4m3fn), torch.ones(1)).double()


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
    """The first line of sm1xx_blockscaled_gemm.cuh, in float64."""
    row = capability.KERNELS[kernel]
    y = values(x, x_scales, row.activations) @ values(weight, weight_scales, row.weights).T
    if token_scale is not None:
        y *= token_scale[:, None]
    if row_scale is not None:
        y *= row_scale
    if branch is not None:
        assert branch.dtype == torch.float32
        y += branch
    if bias is not None:
        y += bias
    return y.to(dtype)


@pytest.fixture(autouse=True)
def _device_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blackwell, "quantize_activations", quantize)
    monkeypatch.setattr(blackwell, "gemm", gemm)


def packed(fmt: SiteFormat, outputs: int, channels: Tensor, seed: int) -> dict[str, Tensor]:
    """A packed linear with random numbers, its tensors named as in a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, WIDTH, generator=generator)
    tensors: dict[str, Tensor] = {}
    if fmt.branch is not None:
        branch = weight[:, channels]
        weight[:, channels] = 0
        pad = torch.zeros(outputs, fmt.outliers - len(channels))
        branch = torch.cat([branch, pad], 1)
        tensors["outlier_index"] = index_tensor(channels, fmt.outliers)
        tensors["outlier_weight"] = branch.to(torch.bfloat16)
        if fmt.branch == "fp8":
            scale = e8m0.power_of_two(
                torch.randint(-3, 4, (outputs, 1), generator=generator, dtype=torch.int32)
            )
            tensors["outlier_weight"] = (branch / scale).to(torch.float8_e4m3fn)
            tensors["outlier_weight_scale"] = scale
    if fmt.weights == "mxfp8":
        tensors["weight"], tensors["weight_scale"] = mxfp8.quantize(weight, "even")
    elif fmt.weights == "mxfp4":
        tensors["weight_packed"], tensors["weight_scale"] = mxfp4.quantize(weight, "even")
    else:
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        tensors.update(zip(names, nvfp4.quantize(weight), strict=True))
    if fmt.activations == "nvfp4":
        tensors["input_global_scale"] = torch.tensor([100.0])
    return tensors


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("pair", capability.PAIRS)
def test_a_fused_site_equals_the_reference_of_each_linear(
    pair: tuple[str, str], branch: str | None
) -> None:
    channels = torch.tensor([3, 40, 99, 255])
    fmt = SiteFormat(*pair, branch=branch, outliers=16 if branch else 0)
    linears: list[dict[str, Any]] = [
        packed(fmt, outputs, channels, seed) for seed, outputs in enumerate(OUTPUTS)
    ]
    linears[1]["bias"] = torch.randn(OUTPUTS[1]).to(torch.bfloat16)  # only one has a bias
    kernel = capability.find(*pair, branch, (10, 0))
    assert isinstance(kernel, capability.Kernel)
    work = dispatch.Work(*pair, branch, "even", None, WIDTH, OUTPUTS, fmt.outliers)
    assert blackwell.refuse(kernel, work) is None
    module = blackwell.BlockScaledLinear(kernel, work, linears)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))
    x[:, channels] *= 50
    x = x.to(torch.bfloat16)
    want = torch.cat(
        [
            reference.packed_linear(
                x.float(),  # float32: nothing but the operands is rounded
                {k: v for k, v in linear.items() if k != "bias"},
                fmt,
                "even",
                linear.get("bias"),
            )
            for linear in linears
        ],
        dim=1,
    )
    got = module(x)
    assert got.dtype == torch.bfloat16
    error = (got.double() - want.double()).abs().max() / want.abs().max()
    assert error < 2.0**-8, "the only rounding is that of the result to bfloat16"


def test_the_execution_layout_keeps_the_size_of_the_packed_weight() -> None:
    fmt = SiteFormat("mxfp4", "mxfp4")
    linear = packed(fmt, 256, torch.empty(0, dtype=torch.long), 0)
    kernel = capability.find("mxfp4", "mxfp4", None, (12, 0))
    assert isinstance(kernel, capability.Kernel)
    work = dispatch.Work("mxfp4", "mxfp4", None, "even", None, WIDTH, (256,))
    module = blackwell.BlockScaledLinear(kernel, work, [linear])
    assert sum(b.nbytes for b in module.buffers()) == sum(t.nbytes for t in linear.values())
    assert not module.state_dict(), "the checkpoint's own tensors are what is saved"


def test_linears_of_a_site_must_agree_on_their_input_scale() -> None:
    fmt = SiteFormat("nvfp4", "nvfp4")
    none = torch.empty(0, dtype=torch.long)
    linears = [packed(fmt, 8, none, 0), packed(fmt, 8, none, 1)]
    linears[1]["input_global_scale"] = torch.tensor([99.0])
    kernel = capability.find("nvfp4", "nvfp4", None, (10, 0))
    assert isinstance(kernel, capability.Kernel)
    work = dispatch.Work("nvfp4", "nvfp4", None, "even", None, WIDTH, (8, 8))
    with pytest.raises(Exception, match="input_global_scale"):
        blackwell.BlockScaledLinear(kernel, work, linears)


@pytest.mark.parametrize("activations", ["mxfp4", "mxfp8", "nvfp4"])
def test_fake_kernels_have_the_real_shapes(activations: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = torch.ops.quantkit.sm1xx_quantize_act
    product = torch.ops.quantkit.sm1xx_blockscaled_gemm
    with FakeTensorMode():
        x = torch.empty(7, WIDTH, dtype=torch.bfloat16)
        index = torch.empty(16, dtype=torch.int32)
        codes, scales, gathered = real(x, activations, "even", False, False, index, None, None)
        weight = torch.empty(24, WIDTH // 2, dtype=torch.uint8)
        y = product(codes, scales, None, weight, scales, None, None, None, 0, torch.float16)
    assert codes.shape == (7, WIDTH if activations == "mxfp8" else WIDTH // 2)
    assert scales.numel() == 512 * (WIDTH // blackwell.BLOCK[activations] // 4)
    assert gathered.shape == (7, 16)
    assert (y.shape, y.dtype) == ((7, 24), torch.float16)
