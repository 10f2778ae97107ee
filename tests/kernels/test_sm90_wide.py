"""Hopper's products in bfloat16 (NVFP4, MXFP4 x MXFP8, MXFP8): layouts, and the GPU itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.kernels import capability, dispatch, reference, sm90, sm90_tiles, sm90_wide
from quantkit.kernels.prepare_wide import prepare_fp4, prepare_mxfp8
from quantkit.pack.scheme import SiteFormat
from tests.kernels.test_sm90 import (
    BOUNDS,
    KERNEL,
    exact,
    inputs,
    layer,
    needs_hopper,
    relative_error,
    work,
)

FORMATS = [("nvfp4", "nvfp4"), ("mxfp4", "mxfp8"), ("mxfp8", "mxfp8")]
Layer = tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def wide_layer(
    weights: str, activations: str, outputs: int, width: int, seed: int = 0, device: str = "cpu"
) -> Layer:
    """A packed linear without a branch, and the exact product of its operands."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, width, generator=generator)
    weight *= torch.exp2(
        3 * torch.randn(outputs, width // 32, generator=generator)
    ).repeat_interleave(32, 1)
    weight[:, 32:48], weight[1] = 0, 0
    tensors = {"bias": torch.randn(outputs, generator=generator).bfloat16()}
    if weights == "nvfp4":
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        tensors |= dict(zip(names, nvfp4.quantize(weight), strict=True))
        tensors["input_global_scale"] = torch.tensor([37.5])
    elif weights == "mxfp4":
        names = ("weight_packed", "weight_scale")
        tensors |= dict(zip(names, mxfp4.quantize(weight, "even"), strict=True))
    else:
        names = ("weight", "weight_scale")
        tensors |= dict(zip(names, mxfp8.quantize(weight, "even"), strict=True))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    fmt = SiteFormat(weights, activations)

    def expected(x: torch.Tensor) -> torch.Tensor:
        divisor = tensors.get("input_global_scale")
        operand = reference.quantize_activations(x.float(), activations, "even", divisor)
        decoded = reference.dequantized_weight(tensors, fmt)
        return operand.double() @ decoded.double().T + tensors["bias"].double()

    return tensors, expected


def test_padding_is_zeros_and_rows_have_constants() -> None:
    tensors, _ = wide_layer("mxfp8", "mxfp8", 70, 96)
    plane = prepare_mxfp8(tensors)
    assert plane.weights.shape == (2, 2, 64 * 64 + 64 * 2)
    assert not plane.rows[70:].any()
    assert torch.equal(plane.rows[:70, 1], tensors["bias"].float())
    tensors, _ = wide_layer("nvfp4", "nvfp4", 70, 96)
    plane = prepare_fp4(tensors)
    assert plane.weights.shape == (2, 2, 64 * 64 // 2 + 64 * 4 * 2)
    assert torch.equal(plane.rows[:70, 0], (1 / tensors["weight_global_scale"]).expand(70))


def test_damaged_rows_are_nan() -> None:
    tensors, _ = wide_layer("mxfp8", "mxfp8", 4, 64)
    tensors["weight"].view(torch.uint8)[1, 5] = 0x7F
    tensors["weight_scale"][2, 1] = 255
    assert prepare_mxfp8(tensors).rows[:4, 0].isnan().tolist() == [False, True, True, False]
    tensors, _ = wide_layer("mxfp4", "mxfp8", 4, 64)
    tensors["weight_scale"][2, 1] = 255
    assert prepare_fp4(tensors).rows[:4, 0].isnan().tolist() == [False, False, True, False]


def test_tokens_are_swizzled_tiles() -> None:
    x = torch.arange(3 * 96, dtype=torch.float32).reshape(3, 96).to(torch.bfloat16)
    tiles = sm90_wide.tiles_of(x).view(torch.bfloat16).reshape(2, 8, 8, 8)  # brick, row, chunk
    assert torch.equal(tiles[0, 2, 5 ^ 2], x[2, 40:48])
    assert torch.equal(tiles[1, 1, 3 ^ 1], x[1, 88:96])
    assert not tiles[1, :, :, :][0, 4:].any()  # columns past the end
    assert not tiles[:, 3:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("tokens", [1, 13, 29, 64, 300])
@pytest.mark.parametrize(("width", "outputs"), [(576, (192, 60)), (4096, (3072, 1024))])
def test_products_in_bfloat16_on_the_gpu(
    formats: tuple[str, str], tokens: int, width: int, outputs: tuple[int, ...]
) -> None:
    needs_hopper()
    kernel = capability.find(*formats, None, (9, 0))
    assert not isinstance(kernel, str)
    task = dispatch.Work(*formats, None, "even", None, width, outputs)
    site = [wide_layer(*formats, n, width, i, "cuda") for i, n in enumerate(outputs)]
    module = sm90_wide.prepare(kernel, task, [tensors for tensors, _ in site])
    x = inputs(tokens, width)
    wanted = torch.cat([expected(x) for _, expected in site], 1)
    operands = module.quantize(x)
    for dtype in (torch.bfloat16, torch.float32):
        y = module.multiply(*operands, dtype)
        # Few outputs outweigh the others here, and so does their rounding.
        rounding = relative_error(wanted.to(dtype), wanted)
        assert relative_error(y, wanted) <= max(BOUNDS[dtype], rounding + 1e-4), dtype
        assert torch.equal(y, module.multiply(*operands, dtype)), dtype


@pytest.mark.gpu
@pytest.mark.parametrize("tile", sm90_tiles.CANDIDATES, ids=str)
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
def test_candidates_on_the_gpu(tile: sm90_tiles.Tile, branch: str | None) -> None:
    needs_hopper()
    for width, outputs in ((576, (192, 60)), (4096, (3072, 1024)), (12288, (1088,))):
        task = work(width, outputs, branch, 48 if branch else 0)
        linears = layer(task, "cuda")
        module = sm90.prepare(KERNEL, task, linears)
        for tokens in (300, 257) if tile.tokens == 256 else (tile.tokens, tile.tokens - 3):
            x = inputs(tokens, width)
            with sm90_tiles.trying(tile):
                y = module(x)
                assert torch.equal(y, module(x))
            assert relative_error(y, exact(task, linears, x)) <= BOUNDS[torch.bfloat16]
