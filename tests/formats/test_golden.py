"""The formats against bytes made by torchao (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.formats import mxfp4, mxfp8, nvfp4

GOLDEN = Path(__file__).parent.parent / "golden" / "formats.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_mxfp4_bytes(golden: dict[str, Tensor], rule: str) -> None:
    packed, scale = mxfp4.quantize(golden["input"], rule)
    assert torch.equal(packed, golden[f"mxfp4_{rule}_packed"])
    assert torch.equal(scale, golden[f"mxfp4_{rule}_scale"])


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_mxfp8_bytes(golden: dict[str, Tensor], rule: str) -> None:
    data, scale = mxfp8.quantize(golden["input"], rule)
    assert torch.equal(data.view(torch.uint8), golden[f"mxfp8_{rule}_data"])
    assert torch.equal(scale, golden[f"mxfp8_{rule}_scale"])


def test_nvfp4_bytes(golden: dict[str, Tensor]) -> None:
    packed, scale, divisor = nvfp4.quantize(golden["nvfp4_input"])
    assert torch.equal(packed, golden["nvfp4_packed"])
    assert torch.equal(scale.view(torch.uint8), golden["nvfp4_scale"])
    torch.testing.assert_close(divisor, 1 / golden["nvfp4_tensor_scale"], rtol=2e-7, atol=0)
