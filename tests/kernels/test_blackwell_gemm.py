"""The Blackwell GEMM: its generated text, and that its machine code holds block-scaled MMA."""

from __future__ import annotations

import re

import pytest
import torch

from quantkit.kernels import capability, generate, jit
from quantkit.kernels import sm1xx_blockscaled as blackwell


def kernel(weights: str, activations: str, gpu: tuple[int, int]) -> capability.Kernel:
    found = capability.find(weights, activations, None, gpu)
    assert isinstance(found, capability.Kernel)
    return found


def test_the_generated_text_is_one_instantiation() -> None:
    source = generate.blockscaled_gemm(
        kernel("mxfp4", "mxfp8", (10, 0)), generate.Tile(128, 64, 128), "bf16", branch=True
    )
    assert source.text == (
        '#include "sm100_blockscaled_gemm.cuh"\n'
        "QUANTKIT_EXPORT(quantkit::Sm100BlockScaledGemm<quantkit::mxfp4, quantkit::mxfp8, "
        "quantkit::bf16, true, 128, 64, 128>::type)\n"
    )
    assert (source.name, source.arch) == ("sm100_blockscaled_gemm", "sm_100a")
    assert list(jit.own_headers(source.text)) == [
        "sm100_blockscaled_gemm.cuh",
        "sm1xx_blockscaled_gemm.cuh",
    ]


def test_the_quantizers_text_is_one_instantiation() -> None:
    source = generate.quantize_act("sm_120a", "nvfp4", "fp16", rotate=False, gated=True)
    assert source.text == (
        '#include "sm1xx_quantize_act.cuh"\n'
        "QUANTKIT_EXPORT_QUANTIZE(__half, quantkit::Format::nvfp4, false, true)\n"
    )


@pytest.mark.slow  # a minute or two each
@pytest.mark.parametrize(
    ("gpu", "formats", "tokens", "instruction"),
    [
        ((10, 0), ("mxfp4", "mxfp4"), 1, r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale"),
        (
            (10, 0),
            ("nvfp4", "nvfp4"),
            9999,
            r"tcgen05\.mma\.cta_group::2\.kind::mxf4nvf4\.block_scale",
        ),
        (
            (12, 0),
            ("mxfp4", "mxfp4"),
            1,
            r"mma\.sync\S*kind::mxf4nvf4\.block_scale\S*m16n8k64\S*ue8m0",
        ),
        (
            (12, 0),
            ("nvfp4", "nvfp4"),
            1,
            r"mma\.sync\S*kind::mxf4nvf4\.block_scale\S*m16n8k64\S*ue4m3",
        ),
    ],
)
def test_it_compiles_to_block_scaled_mma(
    gpu: tuple[int, int], formats: tuple[str, str], tokens: int, instruction: str
) -> None:
    try:
        jit.toolchain()
    except jit.MissingCompiler as error:
        pytest.skip(error.message)
    row = kernel(*formats, gpu)
    tile = generate.blockscaled_tile(row, tokens)
    source = generate.blockscaled_gemm(row, tile, "bf16", branch=True)
    library = jit.compile(source.text, source.name, source.arch, ("--keep",))
    text = "".join(path.read_text() for path in library.parent.glob("*.ptx"))
    assert re.search(instruction, text), sorted(set(re.findall(r"\S*mma\S*", text)))


def test_no_tokens_need_no_device() -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    codes, scales, _ = blackwell.quantize_activations(
        x, "mxfp4", "even", False, False, None, None, None
    )
    weight = torch.zeros(16, 32, dtype=torch.uint8)
    y = blackwell.gemm(codes, scales, None, weight, scales, None, None, None, 0, x.dtype)
    assert y.shape == (0, 16)
