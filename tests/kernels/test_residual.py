"""A residual branch: the reference against float64, and kernels that are given a wider input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.formats import mxfp4, nvfp4
from quantkit.kernels import capability, dispatch, reference
from quantkit.pack.layout import index_tensor, padded, tensors_of
from quantkit.pack.rounding import round_weight
from quantkit.pack.scheme import SiteFormat, unrounded
from quantkit.pack.separate import extended, rotated
from quantkit.transforms.hadamard import matrix

OUT, WIDTH, TOKENS = 40, 96, 21
CHANNELS = torch.tensor([3, 40, 41, 90, 95])
DIVISOR = torch.tensor([64.0])
FORMATS = {"mxfp4": mxfp4, "nvfp4": nvfp4}


def problem(seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Inputs with a few large channels, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, width, generator=generator)
    x[:, CHANNELS] *= 30
    return x, torch.randn(OUT, width, generator=generator) / 11


def format_of(name: str, hadamard: dict[str, int] | None = None) -> SiteFormat:
    bare = SiteFormat(name, name, "residual", 64, 0, hadamard)
    return replace(bare, outliers=padded(len(CHANNELS), bare))


def packed(w: Tensor, fmt: SiteFormat) -> dict[str, Tensor]:
    tensors = round_weight(extended(rotated(w, fmt), CHANNELS, fmt), fmt)
    tensors["outlier_index"] = index_tensor(CHANNELS, fmt.outliers)
    if fmt.activations == "nvfp4":
        tensors["input_global_scale"] = DIVISOR
    return tensors


def quantized(x: Tensor, name: str) -> Tensor:
    if name == "nvfp4":
        return nvfp4.fake_quantize(x.float(), DIVISOR).double()
    return mxfp4.fake_quantize(x.float()).double()


def expected(x: Tensor, fmt: SiteFormat, tensors: Mapping[str, Tensor]) -> Tensor:
    """Q(z) W^T + Q((z - Q(z))[S]) W_S^T of the packed numbers, in float64."""
    z = x.double()
    if fmt.hadamard:
        n = fmt.hadamard_size
        z = z @ torch.block_diag(*[matrix(n)] * (WIDTH // n)).double() / n**0.5
    main = quantized(z, fmt.weights)
    lost = torch.zeros(len(x), fmt.outliers, dtype=torch.float64)
    lost[:, : len(CHANNELS)] = (z.float().double() - main)[:, CHANNELS]
    weight = reference.dequantized_weight(tensors, fmt).double()
    return main @ weight[:, :WIDTH].T + quantized(lost, fmt.weights) @ weight[:, WIDTH:].T


@pytest.mark.parametrize("hadamard", [None, {"block": 32}, {"size": WIDTH // 2}])
@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_is_the_formula(name: str, hadamard: dict[str, int] | None) -> None:
    x, w = problem()
    fmt = format_of(name, hadamard)
    tensors = packed(w, fmt)
    wanted = expected(x, fmt, tensors)
    y = reference.packed_linear(x, tensors, fmt, "even")
    assert (y - wanted).norm() < 2e-6 * wanted.norm()
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == tensors_of(fmt, OUT, WIDTH)
    assert tensors["weight_packed"].shape[1] == (WIDTH + fmt.outliers) // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_16_bit_inputs_lose_only_the_rounding_of_the_output(name: str, dtype: torch.dtype) -> None:
    x, w = problem(1)
    x, fmt = x.to(dtype), format_of(name)
    tensors = packed(w, fmt)
    wanted = expected(x.float(), fmt, tensors)
    y = reference.packed_linear(x, tensors, fmt, "even")
    assert y.dtype == dtype
    assert ((y.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6 * wanted.abs().max()).all()


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_residual_is_exact_in_16_bits(name: str, rule: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 64, generator=generator) * torch.randn(300, 64, generator=generator).exp()
    x = x.bfloat16()
    main = reference.quantize_activations(
        x, name, rule, nvfp4.global_scale(x.abs().amax()).log2().floor().exp2()
    )
    lost = reference.residual(x, main, torch.arange(64), 64)
    assert lost.dtype == torch.bfloat16
    assert torch.equal(lost.double(), x.double() - main.double())


@pytest.mark.parametrize("hadamard", [None, {"block": 32}])
def test_nothing_is_appended_where_nothing_is_lost(hadamard: dict[str, int] | None) -> None:
    x, w = problem(3)
    fmt = unrounded(format_of("nvfp4", hadamard))
    y = reference.packed_linear(x, packed(w, fmt), fmt, "even")
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-5)
    operand = reference.input_operand(x, fmt, "even", CHANNELS)
    assert not operand[:, WIDTH:].any()


@pytest.mark.parametrize("name", FORMATS)
def test_large_channels_get_nearer_to_the_product(name: str) -> None:
    x, w = problem(4)
    plain, fmt = SiteFormat(name, name), format_of(name)
    tensors = round_weight(w, plain) | {"input_global_scale": DIVISOR}
    with_it, without = packed(w, fmt), tensors
    weight = reference.dequantized_weight(with_it, fmt)
    exact = x @ weight[:, :WIDTH].T  # of the rounded weights: what the inputs' rounding loses

    def error(y: Tensor) -> float:
        return float((y - exact).norm())

    found = error(reference.packed_linear(x, with_it, fmt, "even"))
    assert found < 0.8 * error(reference.packed_linear(x, without, plain, "even"))


class Widened(nn.Module):
    """What a kernel without a branch computes: the wider site, by the reference."""

    def __init__(self, work: dispatch.Work, linears: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        assert (work.branch, work.outliers, work.width % 16) == (None, 0, 0)
        self.format = SiteFormat(work.weights, work.activations)
        self.work, self.linears = work, linears

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.work.width
        rule, fmt = self.work.rule, self.format
        parts = [reference.packed_linear(x, tensors, fmt, rule) for tensors in self.linears]
        return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["even", "rceil"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_kernel_of_the_wider_input_computes_the_reference(
    name: str, rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = problem(5)
    x, fmt = x.to(dtype), format_of(name)
    linears = [packed(part, fmt) for part in w.split([24, 16])]
    row = next(k for k in capability.KERNELS if k.weights == name)
    module = SimpleNamespace(
        refuse=lambda kernel, work: None, prepare=lambda kernel, work, x: Widened(work, x)
    )
    monkeypatch.setattr(dispatch, "capability", lambda device: row.capability)
    monkeypatch.setattr(dispatch, "_module", lambda kernel: module)
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    dispatch.forget()
    site = (name, name, "residual", rule, None, WIDTH, (24, 16), fmt.outliers, dtype)
    made = dispatch.prepare("layers.0.attn_in", dispatch.Work(*site), linears, torch.device("cuda"))
    assert made is not None
    assert not hasattr(made, "gated"), "the product of gate and up is needed for its residual"
    wanted = [reference.packed_linear(x, tensors, fmt, rule) for tensors in linears]
    assert torch.equal(made(x), torch.cat(wanted, 1))
    said: dict[str, Any] = dispatch.report()["layers.0.attn_in"]
    assert (said["branch"], said["kernel"]) == ("residual", row.name)
    dispatch.forget()


def test_hopper_takes_a_residual_and_says_when_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    cuda = torch.device("cuda")
    work = dispatch.Work("mxfp4", "mxfp4", "residual", "even", None, 256, (64,), 32)
    assert dispatch.choose(work, cuda).name == "sm90 exact-fold"
    rotated_ = dispatch.choose(replace(work, hadamard={"block": 32}), cuda)
    assert rotated_.name == "reference"
    assert "rotated input" in rotated_.reason
    nv = replace(work, weights="nvfp4", activations="nvfp4", outliers=16)
    for hadamard in (None, {"block": 32}):
        assert dispatch.choose(replace(nv, hadamard=hadamard), cuda).name == "sm90 bf16"
