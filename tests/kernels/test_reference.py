"""The reference against float64 on the packed numbers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.formats import e8m0, mxfp4, mxfp8, nvfp4
from quantkit.kernels import reference
from quantkit.pack.layout import padded, tensors_of
from quantkit.pack.rounding import round_weight
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors, rotated, separate
from quantkit.transforms.hadamard import matrix

OUT, WIDTH, TOKENS = 48, 128, 21
CHANNELS = torch.tensor([3, 40, 90])
FORMATS = {"mxfp4": mxfp4, "mxfp8": mxfp8, "nvfp4": nvfp4}


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with three large channels, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    x[:, CHANNELS] *= 30
    return x, torch.randn(OUT, WIDTH, generator=generator) / 11


def packed(w: Tensor, fmt: SiteFormat) -> dict[str, Tensor]:
    rest, branch = w, {}
    if fmt.branch:
        rest, columns = separate(w, CHANNELS)
        branch = branch_tensors(columns, CHANNELS, fmt)
    tensors = round_weight(rotated(rest, fmt), fmt) | branch
    if fmt.activations == "nvfp4":
        tensors["input_global_scale"] = torch.tensor([64.0])
    return tensors


def expected(x: Tensor, w: Tensor, fmt: SiteFormat, tensors: dict[str, Tensor]) -> Tensor:
    """The product of the packed numbers in float64, two paths, written down independently."""
    rest, outliers = x.double().clone(), x.double()[:, CHANNELS]
    if fmt.branch:
        rest[:, CHANNELS] = 0
    if fmt.hadamard:
        h = torch.block_diag(*[matrix(fmt.hadamard_size)] * (WIDTH // fmt.hadamard_size))
        rest = rest @ h / fmt.hadamard_size**0.5
    if fmt.activations == "nvfp4":
        rest = nvfp4.fake_quantize(rest.float(), torch.tensor([64.0])).double()
    elif fmt.activations != "none":
        rest = FORMATS[fmt.activations].fake_quantize(rest.float(), "even").double()
    main = rest @ reference.dequantized_weight(tensors, fmt).double().T
    if not fmt.branch:
        return main
    branch = tensors["outlier_weight"].double()[:, : len(CHANNELS)]
    if fmt.branch == "fp8":
        branch = branch * e8m0.decode(tensors["outlier_weight_scale"]).double()
        outliers = reference.branch_input(outliers.float(), fmt).double()
    return main + outliers @ branch.T


@pytest.mark.parametrize("hadamard", [None, {"block": 32}, {"size": WIDTH}])
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "none"])
def test_float32_is_the_product_of_the_packed_numbers(
    name: str, branch: str | None, hadamard: dict[str, int] | None
) -> None:
    x, w = problem()
    outliers = padded(len(CHANNELS)) if branch else 0
    fmt = SiteFormat(name, name, branch, 64, outliers, hadamard)
    tensors = packed(w, fmt)
    y = reference.packed_linear(x, tensors, fmt, "even")
    wanted = expected(x, w, fmt, tensors)
    assert (y - wanted).norm() < 2e-6 * wanted.norm()
    shapes = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    assert shapes == tensors_of(fmt, OUT, WIDTH, torch.float32)


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_bfloat16_loses_only_the_rounding_of_its_output(name: str, branch: str | None) -> None:
    x, w = problem(1)
    x = x.bfloat16()
    fmt = SiteFormat(name, name, branch, 64, padded(len(CHANNELS)) if branch else 0)
    tensors = packed(w.bfloat16(), fmt)
    y = reference.packed_linear(x, tensors, fmt, "even")
    assert y.dtype == torch.bfloat16
    wanted = expected(x.float(), w, fmt, tensors)
    # Half a unit in the last of eight bits, where cancellation does not amplify it.
    tolerance = 2.0**-8 * wanted.abs() + 1e-6 * wanted.abs().max()
    assert ((y.double() - wanted).abs() <= tolerance).all()


def test_half_precision_inputs_are_computed_in_float32() -> None:
    x, w = problem(2)
    fmt = SiteFormat("mxfp4", "mxfp4")
    tensors = packed(w, fmt)
    y = reference.packed_linear(x.half(), tensors, fmt, "even")
    wanted = expected(x.half().float(), w, fmt, tensors)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3)


def test_separation_without_rounding_changes_nothing() -> None:
    x, w = problem(3)
    fmt = SiteFormat("none", "none", "bf16", 64, 16)
    y = reference.packed_linear(x, packed(w, fmt), fmt, "even")
    torch.testing.assert_close(y, x @ w.T, rtol=1e-6, atol=1e-6)


def test_separated_channels_do_not_touch_the_block_scales() -> None:
    x, _ = problem(4)
    fmt = SiteFormat("mxfp4", "mxfp4", "bf16", 64, 16)
    rest = x.clone()
    rest[:, CHANNELS] = 0
    operand = reference.input_operand(x, fmt, "even", CHANNELS)
    assert torch.equal(operand[:, CHANNELS], x[:, CHANNELS])
    operand[:, CHANNELS] = 0
    assert torch.equal(operand, mxfp4.fake_quantize(rest))
    assert torch.equal(x, problem(4)[0]), "the input itself must stay"


def test_bias_and_leading_dimensions() -> None:
    x, w = problem(5)
    fmt = SiteFormat("mxfp4", "mxfp4")
    tensors, bias = packed(w, fmt), torch.randn(OUT, generator=torch.Generator().manual_seed(1))
    y = reference.packed_linear(x.view(3, 7, WIDTH), tensors, fmt, "even", bias)
    assert y.shape == (3, 7, OUT)
    flat = reference.packed_linear(x, tensors, fmt, "even")
    torch.testing.assert_close(y.view(TOKENS, OUT), flat + bias, rtol=1e-6, atol=1e-6)


def test_weights_only() -> None:
    x, w = problem(6)
    fmt = SiteFormat("mxfp4", "none")
    y = reference.packed_linear(x, packed(w, fmt), fmt, "even")
    torch.testing.assert_close(y, x @ mxfp4.fake_quantize(w).T, rtol=1e-5, atol=1e-5)
