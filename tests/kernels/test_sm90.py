"""Hopper host side on the CPU: sources, shapes; and the kernels themselves on the GPU."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.formats import mxfp4
from quantkit.kernels import capability, dispatch, jit, reference, sm90, sm90_tiles
from quantkit.pack.scheme import SiteFormat

KERNEL = next(row for row in capability.KERNELS if row.module == "sm90")
WIDE = ("fp4 in bf16", "mxfp8 in bf16")


def work(
    width: int = 256,
    outputs: tuple[int, ...] = (64, 32),
    branch: str | None = None,
    outliers: int = 0,
    rule: str = "even",
    hadamard: dict[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dispatch.Work:
    return dispatch.Work("mxfp4", "mxfp4", branch, rule, hadamard, width, outputs, outliers, dtype)


def test_refusals_name_what_cannot_run():
    assert sm90.refuse(KERNEL, work()) is None
    assert sm90.refuse(KERNEL, work(hadamard={"block": 32})) is None
    assert "multiple of 32" in (sm90.refuse(KERNEL, work(width=40)) or "")
    assert "no scale rule 'mse'" in (sm90.refuse(KERNEL, replace(work(), rule="mse")) or "")
    assert "not 4096" in (sm90.refuse(KERNEL, work(hadamard={"size": 4096})) or "")
    assert "not 16400" in (sm90.refuse(KERNEL, work(width=32768, outliers=16400)) or "")


def layer(work: dispatch.Work, device: str = "cpu", low: int = 112, high: int = 128, seed: int = 0):
    """Random packed linears of one site: the tensors of each."""
    generator = torch.Generator().manual_seed(seed)
    linears = []
    index = torch.randperm(work.width, generator=generator)[: work.outliers - 3].sort().values
    for outputs in work.outputs:
        packed = torch.randint(0, 256, (outputs, work.width // 2), generator=generator)
        scale = torch.randint(low, high, (outputs, work.width // 32), generator=generator)
        packed[0, :16] = 0  # a block of zeros
        scale[0, 0] = 3
        packed[1] = 0
        tensors = {
            "weight_packed": packed.to(torch.uint8),
            "weight_scale": scale.to(torch.uint8),
            "bias": torch.randn(outputs, generator=generator).to(work.dtype),
        }
        if work.branch:
            weight = torch.randn(outputs, work.outliers, generator=generator) / 16
            weight[:, work.outliers - 3 :] = 0
            tensors["outlier_index"] = torch.cat([index, torch.full((3,), -1)]).int()
            if work.branch == "fp8":
                scales = torch.exp2(torch.randint(-9, -6, (outputs, 1), generator=generator))
                tensors["outlier_weight"] = (weight / scales).to(torch.float8_e4m3fn)
                tensors["outlier_weight_scale"] = scales.float()
            else:
                tensors["outlier_weight"] = weight.to(torch.bfloat16)
        linears.append({name: tensor.to(device) for name, tensor in tensors.items()})
    return linears


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
def test_linears_of_a_site_are_stacked(branch):
    task = work(branch=branch, outliers=16 if branch else 0)
    prepared = sm90.stack(task, layer(task))
    assert prepared.out_features == 96
    assert prepared.branch == branch
    assert prepared.bricks == 2
    assert prepared.branch_bricks == (1 if branch else 0)


def test_fake_kernels_give_shapes_and_types():
    task = work(branch="bf16", outliers=16)
    module = sm90.ExactFoldLinear(task, layer(task)).to("meta")
    for tokens in (1, 17, 300):
        x = torch.empty(tokens, 256, dtype=torch.bfloat16, device="meta")
        y = module(x)
        assert y.shape == (tokens, 96)
        assert y.dtype == torch.bfloat16
        tiles, scales, count = module.quantize(x)
        size = sm90_tiles.token_tile(tokens)
        assert tiles.shape == (-(-tokens // size), size * (2 * 128 + 64))
        assert scales.shape == (-(-tokens // size) * size, 2)
        assert count == tokens
        tiles, scales, count = module.quantize(torch.cat([x, x], 1), gated=True)
        assert tiles.shape == (-(-tokens // size), size * (2 * 128 + 64))
        assert module.normed(x, x[0], 1e-6).shape == (tokens, 96)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory):
    """Compiles a source for Hopper with the compiler's resource report and returns its log."""
    try:
        tools = jit.toolchain()
    except jit.MissingCompiler as error:
        pytest.skip(error.message)

    def build(text: str) -> str:
        folder = tmp_path_factory.mktemp("build")
        (folder / jit.SOURCE).write_text(text)
        command = jit.command_line("sm_90a", ("-Xptxas", "-v"), tools)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return build


def test_a_gemm_compiles_without_spills_or_serialized_wgmma(built):
    tile = sm90_tiles.plan(24576, 4096, 16).tile
    log = built(sm90_tiles.gemm_text(tile, "mxfp4", "bf16"))
    assert "C75" not in log  # "wgmma.mma_async instructions are serialized"
    assert " 0 bytes spill stores" in log


@pytest.mark.slow
def test_every_tile_compiles_without_serialized_wgmma(built):
    for tile in (*sm90_tiles.TILES, *sm90_tiles.CANDIDATES):
        log = built(sm90_tiles.gemm_text(tile, "mxfp4", "fp8"))
        assert "C75" not in log
        spilled = int(log.split(" bytes spill stores")[0].split()[-1])
        assert spilled <= 64, tile  # outside the main loop


@pytest.mark.parametrize(("form", "branch"), [(WIDE[0], "fp8"), (WIDE[1], None)])
def test_bfloat16_products_compile_without_spills_or_serialized_wgmma(built, form, branch):
    tile = sm90_tiles.plan(4096, 12288, 16).tile
    log = built(sm90_tiles.gemm_text(tile, form, branch))
    assert "C75" not in log
    assert " 0 bytes spill stores" in log


@pytest.mark.slow
def test_every_tile_of_bfloat16_products_compiles_without_serialized_wgmma(built):
    for tile in sm90_tiles.TILES:
        log = built(sm90_tiles.gemm_text(tile, WIDE[0], "fp8"))
        assert "C75" not in log
        spilled = int(log.split(" bytes spill stores")[0].split()[-1])
        assert spilled <= 64, tile  # outside the main loop


def test_streams_have_flags_of_their_own_made_before_any_capture(monkeypatch):
    made, stream, device = [], [11], torch.device("cuda:0")
    zeros = torch.zeros
    monkeypatch.setattr(sm90, "_flags", {})
    monkeypatch.setattr(sm90, "_rows", {})
    monkeypatch.setattr(sm90, "_multiprocessors", lambda index: 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    current = type("Stream", (), {"cuda_stream": property(lambda self: stream[0])})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(
        torch, "zeros", lambda shape, dtype, device: made.append(shape) or zeros(shape, dtype=dtype)
    )
    sm90.reserve(device)
    sm90.reserve(device)
    rows = []
    for handle in range(sm90.STREAMS):
        stream[0] = handle
        rows.append(sm90._flags_of_stream(device).data_ptr())
    assert len(set(rows)) == sm90.STREAMS
    stream[0] = 7
    assert sm90._flags_of_stream(device).data_ptr() == rows[7]
    assert made == [(sm90.STREAMS, 4)]
    stream[0] = sm90.STREAMS
    with pytest.raises(QuantkitError, match="no flags are left"):
        sm90._flags_of_stream(device)


# ---- on the GPU

# Of the float32 sum, and with it the rounding of the output (relative, root mean square).
BOUNDS = {torch.bfloat16: 1.8e-3, torch.float16: 3.7e-4, torch.float32: 3e-4}


def needs_hopper() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    build_all()


@cache
def build_all() -> None:
    """Compile every kernel of these tests on all cores rather than one by one."""
    tiles = (*sm90_tiles.TILES, *sm90_tiles.CANDIDATES)
    texts = [sm90_tiles.gemm_text(t, "mxfp4", b) for t in tiles for b in (None, "bf16", "fp8")]
    branches = (None, "bf16", "fp8")
    texts += [
        sm90_tiles.gemm_text(t, w, b) for t in sm90_tiles.TILES for w in WIDE for b in branches
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda text: jit.compile(text, "sm90_gemm", sm90.ARCH), texts))


def exact(task: dispatch.Work, linears, x: torch.Tensor) -> torch.Tensor:
    """The product of the dequantized operands in float64."""
    hadamard = task.hadamard
    fmt = SiteFormat("mxfp4", "mxfp4", task.branch, 32, task.outliers, hadamard)
    outs = []
    for tensors in linears:
        channels = None
        if task.branch:
            index = tensors["outlier_index"]
            channels = index[index >= 0].long()
        operand = reference.input_operand(x.float(), fmt, task.rule, channels)
        weight = reference.weight_operand(tensors, fmt, torch.float32)
        outs.append(operand.double() @ weight.double().T + tensors["bias"].double())
    return torch.cat(outs, 1)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def inputs(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(tokens, width, device="cuda") * torch.exp2(torch.randn(width, device="cuda"))
    x[-1, :64] = 0
    return x.to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 13, 16, 29, 32, 61, 64, 130, 192, 257, 500])
@pytest.mark.parametrize(
    ("width", "outputs"), [(576, (576, 192, 192)), (1536, (576,)), (4096, (3072, 1024))]
)
def test_the_gemm_is_exact_up_to_its_sum(branch, tokens, width, outputs):
    needs_hopper()
    task = work(width, outputs, branch, 48 if branch else 0)
    linears = layer(task, "cuda", 110, 125)
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(tokens, width)
    expected = exact(task, linears, x)
    operands = module.quantize(x)
    for dtype, bound in BOUNDS.items():
        y = module.multiply(*operands, dtype)
        assert relative_error(y, expected) <= bound, dtype
        assert torch.equal(y, module.multiply(*operands, dtype)), dtype


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("tile", sm90_tiles.CANDIDATES, ids=str)
def test_candidates_are_exact_up_to_their_sum(tile, branch):
    needs_hopper()
    task = work(4224, (3072, 60), branch, 48 if branch else 0)
    linears = layer(task, "cuda", 110, 125)
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(tile.tokens - 3, 4224)
    expected = exact(task, linears, x)
    operands = module.quantize(x)
    with sm90_tiles.trying(tile):
        y = module.multiply(*operands, torch.bfloat16)
        assert relative_error(y, expected) <= BOUNDS[torch.bfloat16]
        for _ in range(20):
            assert torch.equal(y, module.multiply(*operands, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [12288, 28672])
@pytest.mark.parametrize("tokens", [3, 16, 48, 300])
def test_long_sums_and_full_range_exponents(width, tokens):
    needs_hopper()
    task = work(width, (1024,))
    linears = layer(task, "cuda", 112, 128)
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(tokens, width)
    expected = exact(task, linears, x)
    assert relative_error(module(x), expected) <= BOUNDS[torch.bfloat16]
    y = module.multiply(*module.quantize(x), torch.float32)
    assert relative_error(y, expected) <= BOUNDS[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("width", [4096, 12320, 28672])
def test_prefill_sums_of_like_and_of_unlike_numbers(width, branch):
    needs_hopper()
    task = work(width, (1024,), branch, 48 if branch else 0)
    linears = layer(task, "cuda", 119, 121)
    module = sm90.prepare(KERNEL, task, linears)
    x = torch.randn(600, width, device="cuda").bfloat16()
    in_branch = linears[0]["outlier_index"].tolist() if branch else []
    channel = next(c for c in range(width) if c not in in_branch)
    for far in ([], [7, 599]):  # tokens with one number far above the others
        x[far, channel] = 3000.0
        tokens, scales, count = module.quantize(x)
        assert (scales[:600, 0] < 0).nonzero()[:, 0].tolist() == far
        y, expected = module.multiply(tokens, scales, count), exact(task, linears, x)
        # Few different products round to bfloat16 worse than many do: the sum's own part counts.
        own = relative_error(y, expected) ** 2 - relative_error(expected.bfloat16(), expected) ** 2
        assert own <= 7e-4**2  # 1.8e-3 with a rounding of 1.66e-3
        assert torch.equal(y, module.multiply(tokens, scales, count))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
@pytest.mark.parametrize("hadamard", [None, {"block": 32}, {"block": 128}])
def test_activations_are_quantized_as_the_reference_does(rule, hadamard):
    needs_hopper()
    task = work(1024, (128,), "bf16", 32, rule, hadamard)
    linears = layer(task, "cuda", 118, 124)
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(40, 1024)
    assert relative_error(module(x), exact(task, linears, x)) <= BOUNDS[torch.bfloat16]


@pytest.mark.gpu
def test_rows_of_wide_span_are_exact_too():
    needs_hopper()
    task = work(1024, (192,), "bf16", 32)
    linears = layer(task, "cuda", 118, 124)
    linears[0]["weight_scale"][5, ::2] = 90
    linears[0]["weight_scale"][100, 3] = 140
    linears[0]["weight_scale"][100, 4] = 100
    module = sm90.prepare(KERNEL, task, linears)
    assert module.planes == 3
    x = inputs(20, 1024)
    assert relative_error(module(x), exact(task, linears, x)) <= BOUNDS[torch.bfloat16]


@pytest.mark.gpu
def test_non_finite_inputs_stay_in_their_token():
    needs_hopper()
    task = work(256, (64,))
    linears = layer(task, "cuda", 118, 124)
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(9, 256)
    expected = module(x)
    x[3, 7] = torch.nan
    x[4, 9] = torch.inf
    y = module(x)
    assert y[3:5, 2:].isnan().all()
    assert torch.equal(torch.cat([y[:3], y[5:]]), torch.cat([expected[:3], expected[5:]]))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_cuda_graphs_and_compile(tokens):
    needs_hopper()
    task = work(4096, (1024,), "bf16", 128)
    linears = layer(task, "cuda", 118, 124)
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(tokens, 4096)
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for _ in range(3):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    assert torch.equal(torch.compile(module, fullgraph=True)(x), expected)


@pytest.mark.gpu
def test_packed_numbers_survive_the_trip(tmp_path):
    """Weights quantized by the format give the reference's output through the kernel."""
    needs_hopper()
    weight = torch.randn(256, 512, device="cuda") / 16
    packed, scale = mxfp4.quantize(weight)
    linears = [{"weight_packed": packed, "weight_scale": scale}]
    task = work(512, (256,))
    module = sm90.prepare(KERNEL, task, linears)
    x = inputs(24, 512)
    fmt = SiteFormat("mxfp4", "mxfp4")
    expected = reference.packed_linear(x.float(), linears[0], fmt, "even")
    assert relative_error(module(x), expected.double()) <= BOUNDS[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_swiglu_inside_the_activation_kernel(branch, tokens):
    needs_hopper()
    task = work(1536, (576,), branch, 48 if branch else 0)
    module = sm90.prepare(KERNEL, task, layer(task, "cuda", 118, 124))
    gate, up = inputs(tokens, 1536), inputs(tokens, 1536)
    product = torch.nn.functional.silu(gate) * up
    y = module.gated(torch.cat([gate, up], 1))
    # The exponential may round the other way, which moves a value to the next code: rarely.
    assert relative_error(y, module(product).double()) < 2e-3
    assert torch.equal(y, module.gated(torch.cat([gate, up], 1)))


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return gain * wide.to(x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 1024), (16, 4096), (300, 4096), (300, 16384), (3, 32768)]
)
def test_rms_norm_inside_the_activation_kernel(branch, tokens, width):
    """Bit for bit where float32 adds the squares exactly in any order; near otherwise."""
    needs_hopper()
    task = work(width, (576,), branch, 48 if branch else 0)
    module = sm90.prepare(KERNEL, task, layer(task, "cuda", 118, 124))
    gain = (1 + torch.randn(width, device="cuda") / 4).bfloat16()
    x = torch.randint(-32, 33, (tokens, width), device="cuda").bfloat16()
    y = module.normed(x, gain, 1e-6)
    assert torch.equal(y, module(rms_norm(x, gain)))
    x = inputs(tokens, width)
    y = module.normed(x, gain, 1e-6)
    assert relative_error(y, module(rms_norm(x, gain)).double()) < 2e-3
    assert torch.equal(y, module.normed(x, gain, 1e-6))
    whole = torch.compile(lambda x: module.normed(x, gain, 1e-6), fullgraph=True)
    assert torch.equal(whole(x), y)
    torch._dynamo.reset()
