"""The activation kernel of Hopper's exact fold: each number that it writes, run on a CPU too."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from quantkit.formats import e8m0, mxfp4
from quantkit.formats.element import E2M1
from quantkit.kernels import sm90, sm90_tiles
from tests.kernels.test_emulated import Emulator, emulator, run_on
from tests.kernels.test_sm90_wide_activation import needs_hopper

__all__ = ["emulator"]
emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
FEW, MANY = 7, 130  # tokens; past 128 a token has one CTA and up to eight units a thread
# Channels of which a thread takes one unit, two, four, eight.
SHAPES = ((FEW, 96), (FEW, 8224), (MANY, 4128), (MANY, 12320), (MANY, 28672))


def written(x: Tensor, rule: str = "even") -> tuple[Tensor, Tensor]:
    """The numbers of `x` [M, K] as the GEMM takes them, float64 [M, K], and its token scales."""
    carry = e8m0.carry(E2M1, rule)
    tiles, scales = sm90.quantize_tokens(x, None, None, False, carry, 0, False)
    size = sm90_tiles.token_tile(len(x))
    rows = tiles.reshape(len(tiles), -1, size, 8, 16).transpose(1, 2).flatten(0, 1)[: len(x)]
    for r in range(8):  # chunk c of token r is at c ^ r % 8
        rows[r::8] = rows[r::8][:, :, torch.arange(8, device=x.device) ^ r]
    folded = rows.flatten(1)[:, : x.shape[1]].view(torch.float8_e5m2).double()
    return folded * scales[: len(x), :1].double().abs(), scales[: len(x), 0]


def nearest(x: Tensor, rule: str = "even") -> Tensor:
    """The format's own numbers, float64."""
    return mxfp4.dequantize(*mxfp4.quantize(x.float(), rule)).double()


def tokens_of(dtype: torch.dtype, tokens: int, width: int) -> Tensor:
    """Tokens from the smallest to the largest magnitude of the type, blocks over 12 octaves."""
    generator = torch.Generator().manual_seed(width)
    low, high = (-130.0, 127.0) if dtype == torch.bfloat16 else (-20.0, 15.0)
    size = torch.linspace(low, high, tokens, dtype=torch.float64)[:, None, None]
    size = size - 12 * torch.rand(tokens, width // 32, 1, generator=generator).double()
    x = torch.randn(tokens, width // 32, 32, generator=generator).double().clamp(-1.875, 1.875)
    x[:, ::3] = (8 * x[:, ::3]).round() / 8  # ties
    x[:, 1::7] = 0
    return torch.ldexp(x, size.round().int()).flatten(1).to(dtype)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_every_number_is_the_nearest(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    run_on(emulator, monkeypatch)
    x = tokens_of(dtype, tokens, width)
    assert torch.equal(written(x)[0], nearest(x))


@emulated
@pytest.mark.parametrize("rule", ["floor", "even4", "ceil", "rceil"])
def test_scale_rules(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    run_on(emulator, monkeypatch)
    x = tokens_of(torch.bfloat16, 24, 1056)
    assert torch.equal(written(x, rule)[0], nearest(x, rule))


@emulated
@pytest.mark.parametrize("width", [1024, 4096, 12288, 28672])
def test_tokens_of_unlike_blocks_are_marked(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """In prefill a negative scale asks for short sums: over a sixteenth of blocks far below."""
    run_on(emulator, monkeypatch)
    monkeypatch.setattr(sm90_tiles, "token_tile", lambda tokens: 256)
    x, marked = unlike_tokens(width)
    assert (written(x)[1] < 0).nonzero()[:, 0].tolist() == marked


def unlike_tokens(width: int) -> tuple[Tensor, list[int]]:
    """Tokens bfloat16 [MANY, K] of many sizes, and those with too many blocks far below."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MANY, width // 32, 32, generator=generator)
    far = torch.ones(MANY, width // 32, 1)
    blocks = width // 32
    for token, count in ((3, blocks // 16), (4, blocks // 16 + 1), (5, 1), (6, blocks - 1)):
        far[token, torch.randperm(blocks, generator=generator)[:count]] = 2.0**-12
    far[7] = 2.0**-12  # all alike
    x = x * far * torch.exp2(torch.arange(MANY) % 80 - 40)[:, None, None]
    x[8] = 0
    return x.flatten(1).bfloat16(), [4, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (3, 28672), (300, 4096), (1, 65536)])
def test_every_number_is_the_nearest_on_the_gpu(
    tokens: int, width: int, dtype: torch.dtype
) -> None:
    needs_hopper()
    x = tokens_of(dtype, tokens, width)
    for rule in ("even", "floor", "rceil"):
        assert torch.equal(written(x.cuda(), rule)[0].cpu(), nearest(x, rule))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 4096, 12288, 28672])
def test_tokens_of_unlike_blocks_are_marked_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    needs_hopper()
    monkeypatch.setattr(sm90_tiles, "token_tile", lambda tokens: 256)
    x, marked = unlike_tokens(width)
    assert (written(x.cuda())[1] < 0).nonzero()[:, 0].tolist() == marked
