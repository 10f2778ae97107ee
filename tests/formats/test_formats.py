"""Number formats: every value of every grid, edge blocks, dtypes, and the one-pass quantizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantkit.formats import FORMATS, RULES, e2m1, e8m0, mxfp4, mxfp8, nvfp4
from quantkit.formats.element import E2M1, E4M3, round_to_element


def spread(rows: int = 64, width: int = 128, seed: int = 0) -> Tensor:
    """Blocks over forty octaves, Gaussian inside."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width // 16, 16, generator=generator)
    octave = torch.randint(-20, 20, (rows, width // 16, 1), generator=generator)
    return (x * 2.0**octave).flatten(1)


def test_e2m1_codes_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1.encode(e2m1.decode(codes)), codes)
    assert torch.equal(e2m1.unpack(e2m1.pack(codes)), codes)
    assert e2m1.pack(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [0x21]
    assert torch.equal(e2m1.decode_packed(e2m1.pack(codes)), e2m1.decode(codes))


@pytest.mark.parametrize(
    ("x", "rounded"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)],
)
def test_e2m1_ties_go_to_even(x: float, rounded: float) -> None:
    up, down = math.nextafter(x, 9) + 1e-6, math.nextafter(x, 0) - 1e-6
    values = round_to_element(torch.tensor([x, -x, up, down]), E2M1)
    assert values[:2].tolist() == [rounded, -rounded]
    assert values[2] > values[3]


def test_e4m3_rounding_is_the_casts() -> None:
    x = torch.cat([spread().flatten() * 1e-3, torch.tensor([0.0, -0.0, 2**-10, 3 * 2**-10])])
    x = x[x.abs() <= 448]
    assert torch.equal(round_to_element(x, E4M3), x.to(torch.float8_e4m3fn).float())


def test_elements_saturate() -> None:
    assert round_to_element(torch.tensor([1e9, -7.0]), E2M1).tolist() == [6.0, -6.0]
    assert round_to_element(torch.tensor([1e9, -500.0]), E4M3).tolist() == [448.0, -448.0]


def test_e8m0_codes() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    decoded = e8m0.decode(codes)
    assert torch.equal(decoded[:255].double(), 2.0 ** (torch.arange(255).double() - 127))
    assert decoded[255].isnan()
    assert torch.equal(e8m0.decode(codes[:255].view(torch.float8_e8m0fnu)), decoded[:255])
    assert torch.equal(e8m0.encode(torch.arange(-127, 129).int()), codes)


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_scale_rules_by_their_definitions(rule: str) -> None:
    amax = spread().abs().flatten().double()
    p = torch.floor(torch.log2(amax))
    expected = {
        "floor": p - 2,
        "even": p - 2 + (amax >= 1.75 * 2**p),
        "ceil": torch.ceil(torch.log2(amax)) - 2,
        "rceil": torch.ceil(torch.log2(amax / 6)),
    }[rule]
    assert torch.equal(e8m0.scale_exponent(amax.float(), E2M1, rule).double(), expected)


def test_even4_never_saturates_e4m3() -> None:
    amax = spread().abs().flatten().double()
    p = torch.floor(torch.log2(amax))
    exponent = e8m0.scale_exponent(amax.float(), E4M3, "even4").double()
    assert torch.equal(exponent, p - 8 + (amax >= 1.75 * 2**p))
    assert (amax / 2**exponent <= 448).all()
    by_even = e8m0.scale_exponent(amax.float(), E4M3, "even").double()
    assert (amax / 2**by_even > 448).any(), "even rounds to E4M3's own precision"


def test_mse_rule_is_the_best_of_three() -> None:
    x = spread()
    even = e8m0.scale_exponent(x.unflatten(1, (-1, 32)).abs().amax(-1), E2M1, "even")
    errors = []
    for step in (-1, 0, 1):
        packed, scale = mxfp4.quantize_with_exponents(x, even + step)
        error = (mxfp4.dequantize(packed, scale) - x).unflatten(1, (-1, 32)).square().sum(-1)
        errors.append(error)
    packed, scale = mxfp4.quantize(x, "mse")
    error = (mxfp4.dequantize(packed, scale) - x).unflatten(1, (-1, 32)).square().sum(-1)
    assert torch.equal(error, torch.stack(errors).amin(0))
    assert (error < errors[1]).any()


def test_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="unknown scale rule 'best': one of floor, even"):
        mxfp4.quantize(torch.ones(1, 32), "best")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_widths_that_do_not_divide_are_refused(name: str) -> None:
    module = {"mxfp4": mxfp4, "mxfp8": mxfp8, "nvfp4": nvfp4}[name]
    for function in (module.quantize, module.fake_quantize):
        with pytest.raises(ValueError, match=f"width 40 is not a multiple of .* {module.BLOCK}"):
            function(torch.ones(2, 40))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_is_quantize_and_dequantize(rule: str, dtype: torch.dtype) -> None:
    x = spread(3000).to(dtype)  # more than one cache-sized piece
    for module in (mxfp4, mxfp8):
        two_steps = module.dequantize(*module.quantize(x, rule), dtype=dtype)
        assert torch.equal(module.fake_quantize(x, rule), two_steps)


@pytest.mark.parametrize("module", [mxfp4, mxfp8])
def test_input_dtype_does_not_matter(module: object) -> None:
    x = (spread() * 2.0**-8).clamp(-1e4, 1e4).bfloat16()
    x = torch.where(x.abs() < 2**-14, 0, x)  # exact in float16 too
    bytes_ = module.quantize(x)  # type: ignore[attr-defined]
    for dtype in (torch.float32, torch.float16, torch.float64):
        other = module.quantize(x.to(dtype))  # type: ignore[attr-defined]
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(bytes_, other, strict=True)
        )


def test_bfloat16_holds_every_dequantized_value() -> None:
    x = spread()
    for module in (mxfp4, mxfp8):
        values = module.dequantize(*module.quantize(x))
        assert torch.equal(values.bfloat16().float(), values)


@pytest.mark.parametrize("module", [mxfp4, mxfp8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_number_marks_its_block_only(module: object, bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[1, 40] = bad
    data, scale = module.quantize(x)  # type: ignore[attr-defined]
    assert scale[1, 1] == 255
    assert (scale != 255).sum() == 3
    for values in (module.dequantize(data, scale), module.fake_quantize(x)):  # type: ignore[attr-defined]
        assert values[1, 32:].isnan().all()
        assert not values[0].isnan().any()
        assert not values[1, :32].isnan().any()


def test_a_bad_number_marks_its_nvfp4_block_only() -> None:
    x = torch.ones(2, 32)
    x[1, 20] = torch.nan
    values = nvfp4.dequantize(*nvfp4.quantize(x, torch.tensor([2688.0])))
    assert values[1, 16:].isnan().all()
    assert values.isnan().sum() == 16
    assert torch.equal(nvfp4.fake_quantize(x, torch.tensor([2688.0])).isnan(), values.isnan())


def test_zero_tiny_and_huge_blocks() -> None:
    finfo = torch.finfo(torch.float32)
    x = torch.zeros(4, 32)
    x[1, 3] = finfo.smallest_normal * 2.0**-20  # a subnormal
    x[2, 3], x[2, 4] = finfo.max, -finfo.max
    x[3, 3] = 6 * 2.0**-127
    for module in (mxfp4, mxfp8):
        for rule in RULES:
            values = module.dequantize(*module.quantize(x, rule))
            assert values[0].abs().max() == 0
            assert values.isfinite().all()
            assert torch.equal(module.fake_quantize(x, rule), values)
            assert values[2, 3] >= 0.74 * finfo.max
    assert mxfp4.dequantize(*mxfp4.quantize(x))[3, 3] == x[3, 3]
    values = nvfp4.dequantize(*nvfp4.quantize(torch.zeros(2, 16)))
    assert torch.equal(values, torch.zeros(2, 16))


def test_nvfp4_small_blocks_keep_a_scale() -> None:
    x = torch.full((1, 32), 1000.0)
    x[:, 16:] = 1e-5  # far below the reach of E4M3 under this tensor's divisor
    _, scale, divisor = nvfp4.quantize(x)
    assert scale.float()[0, 1] == nvfp4.SMALLEST_SCALE
    assert divisor == torch.tensor(2688.0) / 1000


def test_nvfp4_fake_quantize_is_quantize_and_dequantize() -> None:
    x = spread() * 2.0**-6
    divisor = nvfp4.global_scale(x.abs().amax())
    assert torch.equal(nvfp4.fake_quantize(x), nvfp4.dequantize(*nvfp4.quantize(x)))
    assert torch.equal(
        nvfp4.fake_quantize(x, divisor * 3), nvfp4.dequantize(*nvfp4.quantize(x, divisor * 3))
    )


def test_quality_on_gaussian_blocks() -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))

    def decibels(values: Tensor) -> float:
        return float(10 * torch.log10(x.square().sum() / (values - x).square().sum()))

    # Monte-Carlo figures of the scale rules on Gaussian blocks, to a tenth of a decibel.
    for rule, expected in {"floor": 18.79, "even": 19.03, "rceil": 18.76, "mse": 19.05}.items():
        assert decibels(mxfp4.fake_quantize(x, rule)) == pytest.approx(expected, abs=0.1)
    assert decibels(nvfp4.fake_quantize(x)) > 20
    assert decibels(mxfp8.fake_quantize(x)) > 31


def test_bits_count_the_scales() -> None:
    bits = {name: info.bits for name, info in FORMATS.items()}
    assert bits == {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8": 8.25, "bf16": 16, "none": 0}
