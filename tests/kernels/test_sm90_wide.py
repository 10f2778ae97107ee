"""Hopper's products in bfloat16 (NVFP4, MXFP4 x MXFP8, MXFP8): layouts, and the GPU itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.kernels import capability, dispatch, reference, sm90, sm90_tiles, sm90_wide
from quantkit.kernels.prepare import BRANCH_COLUMNS
from quantkit.kernels.prepare_wide import prepare_fp4, prepare_mxfp8
from quantkit.kernels.sm90_tiles import Tile
from quantkit.kernels.sm90_wide_activation import tiles_of
from quantkit.pack.layout import channels_of, index_tensor
from quantkit.pack.scheme import SiteFormat
from tests.kernels.test_prepare import MAGNITUDES, decode_branch_brick
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
BRANCHES = (None, "bf16", "fp8")
CHANNELS, COLUMNS = 45, 48
Layer = tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def wide_work(
    formats: tuple[str, str],
    width: int,
    outputs: tuple[int, ...],
    branch: str | None = None,
    hadamard: dict[str, int] | None = None,
) -> dispatch.Work:
    """What a site of `wide_layer`s computes."""
    columns = COLUMNS if branch else 0
    return dispatch.Work(*formats, branch, "even", hadamard, width, outputs, columns)


def wide_layer(
    task: dispatch.Work,
    outputs: int,
    seed: int = 0,
    device: str = "cpu",
    divisor: float | None = 37.5,
) -> Layer:
    """A packed linear of `task`, and the exact product of its operands.

    The branch has CHANNELS channels and padding; a row of the main weight is zeros.
    """
    weights, width = task.weights, task.width
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
        if divisor is not None:
            tensors["input_global_scale"] = torch.tensor([divisor])
    elif weights == "mxfp4":
        names = ("weight_packed", "weight_scale")
        tensors |= dict(zip(names, mxfp4.quantize(weight, "even"), strict=True))
    else:
        names = ("weight", "weight_scale")
        tensors |= dict(zip(names, mxfp8.quantize(weight, "even"), strict=True))
    if task.branch:
        channels = torch.randperm(width, generator=torch.Generator().manual_seed(width))
        tensors["outlier_index"] = index_tensor(channels[:CHANNELS], COLUMNS)
        branch = 2 * torch.randn(outputs, COLUMNS, generator=generator)
        branch[:, CHANNELS:] = 0
        if task.branch == "fp8":
            own = torch.exp2(torch.randint(-9, -6, (outputs, 1), generator=generator))
            tensors["outlier_weight"] = (branch / own).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors["outlier_weight_scale"] = own.float()
        else:
            tensors["outlier_weight"] = branch.to(torch.bfloat16)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    fmt = SiteFormat(weights, task.activations, task.branch, 32, task.outliers, task.hadamard)

    def expected(x: torch.Tensor) -> torch.Tensor:
        scale, channels = tensors.get("input_global_scale"), channels_of(tensors)
        operand = reference.input_operand(x.float(), fmt, task.rule, channels, scale)
        decoded = reference.weight_operand(tensors, fmt, torch.float32)
        return operand.double() @ decoded.double().T + tensors["bias"].double()

    return tensors, expected


def test_padding_is_zeros_and_rows_have_constants() -> None:
    tensors, _ = wide_layer(wide_work(("mxfp8", "mxfp8"), 96, (70,)), 70)
    plane = prepare_mxfp8(tensors)
    assert plane.weights.shape == (2, 2 * (64 * 64 + 64 * 2))
    assert not plane.rows[70:].any()
    assert torch.equal(plane.rows[:70, 1], tensors["bias"].float())
    tensors, _ = wide_layer(wide_work(("nvfp4", "nvfp4"), 96, (70,)), 70)
    plane = prepare_fp4(tensors)
    assert plane.weights.shape == (2, 2 * (64 * 64 // 2 + 64 * 4 * 2))
    assert torch.equal(plane.rows[:70, 0], (1 / tensors["weight_global_scale"]).expand(70))


def test_damaged_rows_are_nan() -> None:
    tensors, _ = wide_layer(wide_work(("mxfp8", "mxfp8"), 64, (4,)), 4)
    tensors["weight"].view(torch.uint8)[1, 5] = 0x7F
    tensors["weight_scale"][2, 1] = 255
    assert prepare_mxfp8(tensors).rows[:4, 0].isnan().tolist() == [False, True, True, False]
    tensors, _ = wide_layer(wide_work(("mxfp4", "mxfp8"), 64, (4,)), 4)
    tensors["weight_scale"][2, 1] = 255
    assert prepare_fp4(tensors).rows[:4, 0].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("formats", FORMATS)
def test_no_tokens_give_no_rows(formats: tuple[str, str], branch: str | None) -> None:
    task = wide_work(formats, 96, (8, 4), branch)
    tensors = [wide_layer(task, outputs)[0] for outputs in task.outputs]
    nothing = torch.empty(0, 96, dtype=torch.bfloat16)
    assert sm90_wide.WideLinear(task, tensors)(nothing).shape == (0, 12)
    for linear in tensors:
        linear.pop("input_global_scale", None)  # that of the moment
    assert sm90_wide.WideLinear(task, tensors)(nothing).shape == (0, 12)


def test_tokens_are_swizzled_tiles() -> None:
    x = torch.arange(3 * 96, dtype=torch.float32).reshape(3, 96).to(torch.bfloat16)
    tiles = tiles_of(x, 128).view(torch.bfloat16).reshape(2, 8, 8, 8)  # brick, row, chunk
    assert torch.equal(tiles[0, 2, 5 ^ 2], x[2, 40:48])
    assert torch.equal(tiles[1, 1, 3 ^ 1], x[1, 88:96])
    assert not tiles[1, :, :, :][0, 4:].any()  # columns past the end
    assert not tiles[:, 3:].any()


def test_the_branch_sum_is_divided_by_what_the_main_one_is_multiplied_by() -> None:
    for formats, lay_out in zip(FORMATS, (prepare_fp4, prepare_fp4, prepare_mxfp8), strict=True):
        tensors, _ = wide_layer(wide_work(formats, 96, (70,), "fp8"), 70)
        rows = lay_out(tensors).rows[:70].double()
        own = tensors["outlier_weight_scale"][:, 0].double()
        assert torch.allclose(rows[:, 0] * rows[:, 2], own, rtol=2e-7, atol=0)
        assert rows[:, 2].max() <= 2.0**63  # a row of zeros, too, leaves the branch in range


@pytest.mark.parametrize("branch", ["bf16", "fp8"])
@pytest.mark.parametrize("formats", FORMATS)
def test_bricks_are_where_the_kernel_reads_them(formats: tuple[str, str], branch: str) -> None:
    """Weights and branch, decoded thread by thread."""
    tensors, _ = wide_layer(wide_work(formats, 160, (70,), branch), 70)
    plane = prepare_mxfp8(tensors) if formats[0] == "mxfp8" else prepare_fp4(tensors)
    size = 64 * 66 if formats[0] == "mxfp8" else 64 * 40
    columns = BRANCH_COLUMNS[branch]
    bricks, side = 3, -(-COLUMNS // columns)
    assert plane.weights.shape == (2, bricks * size + side * max(size, 4096))
    decode = decode_mxfp8_brick if formats[0] == "mxfp8" else decode_fp4_brick
    dtype = tensors["outlier_weight"].dtype
    main, found = torch.zeros(128, bricks * 64).double(), torch.zeros(128, side * columns).double()
    for block, row_bytes in enumerate(plane.weights):
        rows = slice(64 * block, 64 * block + 64)
        for i, brick in enumerate(row_bytes[: bricks * size].reshape(bricks, -1)):
            main[rows, 64 * i : 64 * i + 64] = decode(brick.numpy().tobytes())
        for i, brick in enumerate(row_bytes[bricks * size :].reshape(side, -1)):
            part = decode_branch_brick(brick.numpy().tobytes(), dtype)
            found[rows, columns * i : columns * i + columns] = part
    weight = reference.dequantized_weight(tensors, SiteFormat(*formats)).double()
    if formats[0] == "nvfp4":  # its divisor is no power of two
        tensors["weight_global_scale"] = torch.ones(1)
        weight = reference.dequantized_weight(tensors, SiteFormat(*formats)).double()
        plane.rows[:, 0] = 1
    main *= plane.rows[:, :1].double()
    assert torch.equal(main[:70, :160], weight)
    assert not main[70:].any()
    assert not main[:, 160:].any()
    assert torch.equal(found[:70, :COLUMNS], tensors["outlier_weight"].double())
    assert not found[70:].any()
    assert not found[:, COLUMNS:].any()


def decode_fp4_brick(brick: bytes) -> torch.Tensor:
    """A brick of `Fp4InBf16` to [64, 64] values relative to the row constant."""
    out = torch.full((64, 64), torch.nan, dtype=torch.float64)
    scales = torch.frombuffer(bytearray(brick[2048:]), dtype=torch.bfloat16).double()
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for step in range(4):
            word = int.from_bytes(brick[thread * 16 + step * 4 :][:4], "little")
            for i in range(8):  # row g, then row g + 8
                hi, half, second = i // 4, i // 2 % 2, i % 2
                sign = word >> 15 - 4 * (2 * hi + half) + 16 * second & 1
                value = MAGNITUDES[word >> 4 * i & 7] * (-1) ** sign
                scale = scales[(thread // 4 * 2 + hi) * 4 + step]
                row, column = warp * 16 + hi * 8 + g, step * 16 + half * 8 + 2 * t + second
                out[row, column] = value * scale
    return out


def decode_mxfp8_brick(brick: bytes) -> torch.Tensor:
    """A brick of `Mxfp8InBf16` to [64, 64] values relative to the row constant."""
    out = torch.full((64, 64), torch.nan, dtype=torch.float64)
    codes = torch.frombuffer(bytearray(brick[:4096]), dtype=torch.float8_e4m3fn).double()
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for i in range(32):  # [pair][row][step of the pair][half][two columns]
            pair, hi, step, byte = i // 16, i // 8 % 2, i // 4 % 2, i % 4
            scale = 2.0 ** (brick[4096 + thread // 4 * 4 + hi * 2 + pair] - 247)
            row, column = warp * 16 + hi * 8 + g, (2 * pair + step) * 16 + byte // 2 * 8
            value = codes[pair * 2048 + thread * 16 + i % 16] * scale
            out[row, column + 2 * t + byte % 2] = value
    return out


@pytest.mark.parametrize(("branch", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.float32)])
def test_separated_channels_follow_the_main_tiles(branch: str, dtype: torch.dtype) -> None:
    task = wide_work(("nvfp4", "nvfp4"), 96, (8,), branch)
    tensors, _ = wide_layer(task, 8)
    module = sm90_wide.WideLinear(task, [tensors])
    x = torch.randn(11, 96).to(dtype)
    x[4, :] = 0
    tiles, scales, count = module.quantize(x)
    size, columns = 16, BRANCH_COLUMNS[branch]
    side = -(-COLUMNS // columns)
    assert count == 11
    assert tiles.shape == (1, size * (2 * 128 + side * 64))
    assert scales.shape == (size, 2)
    chunks = tiles[0, size * 256 :].reshape(side, size, 4, 16)
    row, chunk = torch.arange(size)[:, None], torch.arange(4)[None]
    rows = chunks[:, row, chunk ^ row // 2 % 4].transpose(0, 1).reshape(size, side * 64)
    found = rows.view(tensors["outlier_weight"].dtype).float()
    fmt = SiteFormat("nvfp4", "nvfp4", branch)
    wanted = reference.branch_input(x.index_select(1, channels_of(tensors)), fmt).float()
    own = scales[:11] * torch.tensor([[37.5, 1 / 37.5]])
    assert torch.allclose(own[:, 0], torch.ones(11))
    exact = torch.exp2(torch.log2(own[:, 1:]).round())  # a power of two, or one
    assert torch.allclose(own[:, 1:], exact, rtol=1e-6)
    assert torch.equal(found[:11, :CHANNELS] * exact, wanted)
    assert not found[:, CHANNELS:].any()
    assert not found[11:].any()


@pytest.mark.parametrize("hadamard", [None, {"block": 32}, {"size": 96}])
def test_quantizing_is_one_graph_of_torch_compile(hadamard: dict[str, int] | None) -> None:
    task = wide_work(("nvfp4", "nvfp4"), 96, (8,), "fp8", hadamard)
    module = sm90_wide.WideLinear(task, [wide_layer(task, 8)[0]])
    x = torch.randn(5, 96).bfloat16()
    tiles, scales, _ = torch.compile(module.quantize, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    expected_tiles, expected_scales, _ = module.quantize(x)
    assert torch.equal(tiles, expected_tiles)
    assert torch.equal(scales, expected_scales)


def test_different_divisors_of_one_input_are_refused() -> None:
    task = wide_work(("nvfp4", "nvfp4"), 64, (8, 8))
    site = [wide_layer(task, 8, divisor=divisor)[0] for divisor in (37.5, 40.0)]
    with pytest.raises(QuantkitError, match="different input_global_scale"):
        sm90_wide.WideLinear(task, site)


def test_a_branch_beside_bfloat16_products_has_scales() -> None:
    tile = sm90_tiles.TILES[0]
    for form in ("fp4 in bf16", "mxfp8 in bf16"):
        assert "ScaledBf16Branch" in sm90_tiles.gemm_text(tile, form, "bf16")
        assert "Fp8Branch" in sm90_tiles.gemm_text(tile, form, "fp8")
        assert "NoBranch" in sm90_tiles.gemm_text(tile, form, None)
    assert " Bf16Branch" in sm90_tiles.gemm_text(tile, "mxfp4", "bf16")


def check_on_the_gpu(
    task: dispatch.Work,
    tokens: int,
    divisor: float | None = 37.5,
    tile: Tile | None = None,
) -> None:
    """Results near the exact ones, the same again; of `tile` if there is one."""
    kernel = capability.find(task.weights, task.activations, task.branch, (9, 0))
    assert not isinstance(kernel, str)
    site = [wide_layer(task, n, i, "cuda", divisor) for i, n in enumerate(task.outputs)]
    module = sm90_wide.prepare(kernel, task, [tensors for tensors, _ in site])
    x = inputs(tokens, task.width)
    wanted = torch.cat([expected(x) for _, expected in site], 1)
    operands = module.quantize(x)
    for dtype in (torch.bfloat16, torch.float32):
        with sm90_tiles.trying(tile) if tile else nullcontext():
            y = module.multiply(*operands, dtype)
            assert torch.equal(y, module.multiply(*operands, dtype)), dtype
        # Few outputs outweigh the others here, and so does their rounding.
        rounding = relative_error(wanted.to(dtype), wanted)
        assert relative_error(y, wanted) <= max(BOUNDS[dtype], rounding + 1e-4), dtype


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("tokens", [1, 13, 29, 64, 300])
@pytest.mark.parametrize(("width", "outputs"), [(576, (192, 60)), (4096, (3072, 1024))])
def test_products_in_bfloat16_on_the_gpu(
    formats: tuple[str, str], tokens: int, width: int, outputs: tuple[int, ...]
) -> None:
    needs_hopper()
    check_on_the_gpu(wide_work(formats, width, outputs), tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", ["bf16", "fp8"])
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 64, 100, 300, 2048])
@pytest.mark.parametrize(
    ("width", "outputs"), [(576, (192, 60)), (4096, (3072, 1024)), (12288, (4096,))]
)
def test_branches_of_bfloat16_products_on_the_gpu(
    formats: tuple[str, str], branch: str, tokens: int, width: int, outputs: tuple[int, ...]
) -> None:
    needs_hopper()
    check_on_the_gpu(wide_work(formats, width, outputs, branch), tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", ["bf16", "fp8"])
@pytest.mark.parametrize("tile", sm90_tiles.TILES, ids=str)
def test_tiles_of_a_branch_beside_bfloat16_products_on_the_gpu(tile: Tile, branch: str) -> None:
    needs_hopper()
    for width, outputs in ((4096, (3072, 1024)), (12288, (1088,))):
        for tokens in (300, 257) if tile.tokens == 256 else (tile.tokens, tile.tokens - 3):
            task = wide_work(("nvfp4", "nvfp4"), width, outputs, branch)
            check_on_the_gpu(task, tokens, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("hadamard", [None, {"block": 32}, {"size": 576}])
def test_divisors_of_the_moment_and_rotations_on_the_gpu(
    branch: str | None, tokens: int, hadamard: dict[str, int] | None
) -> None:
    needs_hopper()
    task = wide_work(("nvfp4", "nvfp4"), 576, (192, 60), branch, hadamard)
    check_on_the_gpu(task, tokens, None)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("hadamard", [None, {"block": 32}])
def test_bfloat16_products_in_cuda_graphs_and_compiled(
    branch: str | None, tokens: int, hadamard: dict[str, int] | None
) -> None:
    needs_hopper()
    task = wide_work(("nvfp4", "nvfp4"), 576, (192, 60), branch, hadamard)
    kernel = capability.find(task.weights, task.activations, task.branch, (9, 0))
    assert not isinstance(kernel, str)
    site = [wide_layer(task, n, i, "cuda")[0] for i, n in enumerate(task.outputs)]
    module = sm90_wide.prepare(kernel, task, site)
    x = inputs(tokens, 576)
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for _ in range(3):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    compiled = torch.compile(module, fullgraph=True, backend="cudagraphs")
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True)(x), expected)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", sm90_tiles.CANDIDATES, ids=str)
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
def test_candidates_on_the_gpu(tile: Tile, branch: str | None) -> None:
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
