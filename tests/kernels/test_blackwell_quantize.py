"""The Blackwell activation kernel, run on the host: its bytes are those of quantkit.formats."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.kernels import generate, jit
from quantkit.kernels import sm1xx_blockscaled as blackwell
from quantkit.kernels.scale_layout import from_tiles
from quantkit.transforms import hadamard

pytestmark = pytest.mark.filterwarnings("error")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        jit.toolchain()
    except jit.MissingCompiler as error:
        pytest.skip(error.message)


def activations(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows over many octaves, with ties, zeros, a zero block and the largest finite values."""
    generator = torch.Generator().manual_seed(tokens * width)
    octaves = torch.randint(-12, 9, (tokens, width // 32, 1), generator=generator)
    x = torch.randn(tokens, width // 32, 32, generator=generator) * 2.0**octaves
    x = x.to(dtype).flatten(1)
    x[0, :32] = 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], dtype=dtype)
    x[0, 32:64] = torch.cat([ties, -ties, ties * 2, -ties * 2])
    x[-1, 64:96] = torch.finfo(dtype).max
    return x


def run(
    x: Tensor,
    fmt: str,
    rule: str,
    rotate: bool,
    index: Tensor | None,
    divisor: Tensor | None,
    gated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = next(name for name, torch_type in DTYPES.items() if torch_type == x.dtype)
    source = generate.quantize_act("sm_100a", fmt, dtype, rotate, gated)
    library = jit.load(source.text, source.name, source.arch)
    width = x.shape[1] // 2 if gated else x.shape[1]
    mask = None if index is None else blackwell.channel_mask(index, width)
    codes, scales, gathered = blackwell._allocate(x, fmt, index, gated)
    scales.fill_(0xAA)  # padding the kernel must not forget
    args = blackwell.quantize_arguments(
        x, rule, fmt, gated, index, mask, divisor, codes, scales, gathered
    )
    library.run_on_host(ctypes.byref(args))
    blocks = width // blackwell.BLOCK[fmt]
    tiles = scales.view(-1, -(-blocks // 4), 512)
    padded = from_tiles(tiles, len(x), -(-blocks // 4) * 4)
    assert not padded[:, blocks:].any(), "scales of padded columns are zero"
    return codes, padded[:, :blocks], gathered


def assert_same_bytes(got: Tensor, want: Tensor, what: str) -> None:
    wrong = (got != want.view(torch.uint8)).nonzero()
    assert not len(wrong), f"{what} differ first at {wrong[0].tolist()} of {len(wrong)}"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_mxfp4(rule: str, dtype: str) -> None:
    x = activations(5, 160, DTYPES[dtype])
    codes, scales, _ = run(x, "mxfp4", rule, False, None, None)
    want_codes, want_scales = mxfp4.quantize(x, rule)
    assert_same_bytes(scales, want_scales, "scales")
    assert_same_bytes(codes, want_codes, "codes")


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_mxfp8(rule: str) -> None:
    x = activations(3, 96, torch.bfloat16)
    codes, scales, _ = run(x, "mxfp8", rule, False, None, None)
    want_codes, want_scales = mxfp8.quantize(x, rule)
    assert_same_bytes(scales, want_scales, "scales")
    assert_same_bytes(codes, want_codes, "codes")


def test_nvfp4() -> None:
    x = activations(4, 128, torch.bfloat16)
    x[-1] = x[0]  # a usual dynamic range for the tensor scale
    divisor = nvfp4.global_scale(x.abs().amax())
    codes, scales, _ = run(x, "nvfp4", "", False, None, divisor)
    want_codes, want_scales, _ = nvfp4.quantize(x, divisor)
    assert_same_bytes(scales, want_scales, "scales")
    assert_same_bytes(codes, want_codes, "codes")


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_outliers_leave_for_the_branch(fmt: str) -> None:
    x = activations(6, 192, torch.bfloat16).clamp(-100, 100)
    index = torch.tensor([0, 31, 32, 45, 127, 191, -1, -1], dtype=torch.int32)
    kept = index[index >= 0].long()
    rest = x.clone()
    rest[:, kept] = 0
    divisor = nvfp4.global_scale(rest.abs().amax()) if fmt == "nvfp4" else None
    codes, scales, gathered = run(x, fmt, "even", False, index, divisor)
    want = nvfp4.quantize(rest, divisor) if fmt == "nvfp4" else mxfp4.quantize(rest, "even")
    assert_same_bytes(scales, want[1], "scales")
    assert_same_bytes(codes, want[0], "codes")
    assert torch.equal(gathered[:, : len(kept)], x[:, kept])
    assert not gathered[:, len(kept) :].any()


def test_rotation_in_blocks_of_32() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-64, 65, (4, 128), generator=generator).to(torch.bfloat16)
    codes, scales, _ = run(x, "mxfp4", "even", True, None, None)
    # Sums of integers are exact in any order: one rounding remains, of the factor 32^-1/2.
    sums = x.double().unflatten(1, (-1, 32)) @ hadamard.matrix(32).T
    rotated = sums.float().flatten(1) * torch.tensor(32**-0.5)
    want_codes, want_scales = mxfp4.quantize(rotated, "even")
    assert_same_bytes(scales, want_scales, "scales")
    assert_same_bytes(codes, want_codes, "codes")
    torch.testing.assert_close(rotated, hadamard.rotate(x.float(), 32), rtol=1e-6, atol=1e-5)


def test_swiglu_comes_first() -> None:
    generator = torch.Generator().manual_seed(4)
    # Where the gate is this large silu is the identity, and at zero it is zero: no exponential.
    gate = torch.randint(0, 3, (5, 96), generator=generator) * 32.0
    up = torch.randn(5, 96, generator=generator)
    gate_up = torch.cat([gate, up], 1).to(torch.bfloat16)
    product = gate_up[:, :96] * gate_up[:, 96:]
    index = torch.tensor([2, 40, -1], dtype=torch.int32)
    rest = product.index_fill(1, torch.tensor([2, 40]), 0)
    codes, scales, gathered = run(gate_up, "mxfp4", "even", False, index, None, gated=True)
    want = mxfp4.quantize(rest, "even")
    assert_same_bytes(scales, want[1], "scales")
    assert_same_bytes(codes, want[0], "codes")
    assert torch.equal(gathered[:, :2], product[:, [2, 40]])


def test_swiglu_is_rounded_as_two_kernels_would() -> None:
    generator = torch.Generator().manual_seed(5)
    gate, up = torch.randn(2, 64, 512, generator=generator).to(torch.bfloat16)
    exact = gate.double().sigmoid().mul(gate.double()).to(torch.bfloat16)  # rounded once, correctly
    want_codes, want_scales = mxfp4.quantize(exact * up, "even")
    codes, scales, _ = run(torch.cat([gate, up], 1), "mxfp4", "even", False, None, None, gated=True)
    assert_same_bytes(scales, want_scales, "scales")
    assert_same_bytes(codes, want_codes, "codes")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_block_that_is_not_finite_is_marked_in_its_scale(fmt: str, bad: float) -> None:
    x = activations(2, 64, torch.bfloat16).clamp(-8, 8)
    x[1, 40] = bad
    divisor = torch.ones(1) if fmt == "nvfp4" else None
    _, scales, _ = run(x, fmt, "even", False, None, divisor)
    block = 40 // blackwell.BLOCK[fmt]
    nan = 0x7F if fmt == "nvfp4" else 0xFF
    assert scales[1, block] == nan
    scales[1, block] = 0
    assert not (scales == nan).any()


def test_rows_may_be_strided() -> None:
    wide = activations(4, 128, torch.bfloat16)
    x = wide[:, 64:]
    codes, _, _ = run(x, "mxfp4", "even", False, None, None)
    assert torch.equal(codes, mxfp4.quantize(x.contiguous(), "even")[0])


def test_channel_mask_sets_one_bit_a_channel() -> None:
    index = torch.tensor([0, 31, 32, 95, -1])
    assert blackwell.channel_mask(index, 96).tolist() == [1 - (1 << 31), 1, -(1 << 31)]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8", "nvfp4"])
def test_on_a_gpu_it_gives_the_bytes_of_the_host(fmt: str, tokens: int) -> None:
    x = activations(tokens, 4096 + 96, torch.bfloat16).clamp(-400, 400)
    index = torch.cat([torch.arange(5, 4096, 32), torch.full((16,), -1)]).to(torch.int32)
    divisor = nvfp4.global_scale(x.abs().amax()) if fmt == "nvfp4" else None
    want = run(x, fmt, "even", False, index, divisor)
    mask = blackwell.channel_mask(index, x.shape[1])
    codes, scales, gathered = blackwell.quantize_activations(
        x.cuda(),
        fmt,
        "even",
        False,
        False,
        index.cuda(),
        mask.cuda(),
        None if divisor is None else divisor.cuda(),
    )
    blocks = x.shape[1] // blackwell.BLOCK[fmt]
    tiles = scales.cpu().view(-1, -(-blocks // 4), 512)
    assert_same_bytes(codes.cpu(), want[0], "codes")
    assert_same_bytes(from_tiles(tiles, tokens, blocks), want[1], "scales")
    assert torch.equal(gathered.cpu(), want[2])
