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


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_a_gpu_makes_the_same_bytes(golden: dict[str, Tensor], rule: str) -> None:
    x = golden["input"].cuda()
    for name, module in (("mxfp4", mxfp4), ("mxfp8", mxfp8)):
        data, scale = module.quantize(x, rule)
        field = "packed" if name == "mxfp4" else "data"
        assert torch.equal(data.view(torch.uint8).cpu(), golden[f"{name}_{rule}_{field}"])
        assert torch.equal(scale.cpu(), golden[f"{name}_{rule}_scale"])
        for dtype in (torch.float32, torch.bfloat16):
            here = module.fake_quantize(x.to(dtype), rule).cpu()
            assert torch.equal(here, module.fake_quantize(x.cpu().to(dtype), rule))
    packed, scale, _ = nvfp4.quantize(golden["nvfp4_input"].cuda())
    assert torch.equal(packed.cpu(), golden["nvfp4_packed"])
    assert torch.equal(scale.view(torch.uint8).cpu(), golden["nvfp4_scale"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_quantizers_give_the_same_values(
    golden: dict[str, Tensor], dtype: torch.dtype
) -> None:
    x = golden["input"].to(dtype)
    divisor = torch.tensor([64.0])
    for module, argument in ((mxfp4, "even"), (mxfp8, "even"), (nvfp4, divisor)):
        compiled = torch.compile(module.fake_quantize, dynamic=True)
        assert torch.equal(compiled(x, argument), module.fake_quantize(x, argument))
