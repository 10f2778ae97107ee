"""Bits per weight against counts made by hand, for our layout and foreign ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.inspect import as_text, inspect
from quantkit.checkpoint.measure import sizes
from quantkit.checkpoint.reader import open_checkpoint
from tests.checkpoint.folders import single

U8, BF16, F8, F32 = torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts"


def stored(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    single(folder, config=json.dumps({"model_type": "llama", **config}).encode())
    save_file(tensors, folder / "model.safetensors")
    return folder


LAYOUTS: dict[str, tuple[dict[str, torch.Tensor], int, float]] = {
    "bf16": ({f"{Q}.weight": torch.zeros(64, 128, dtype=BF16)}, 64 * 128, 16.0),
    "mxfp4": (
        {
            f"{Q}.weight_packed": torch.zeros(64, 64, dtype=U8),
            f"{Q}.weight_scale": torch.zeros(64, 4, dtype=U8),
        },
        64 * 128,
        4.25,
    ),
    "nvfp4": (
        {
            f"{Q}.weight_packed": torch.zeros(64, 64, dtype=U8),
            f"{Q}.weight_scale": torch.zeros(64, 8, dtype=F8),
            f"{Q}.weight_global_scale": torch.zeros(1),
        },
        64 * 128,
        4.5 + 32 / (64 * 128),
    ),
    "mxfp8": (
        {
            f"{Q}.weight": torch.zeros(64, 128, dtype=F8),
            f"{Q}.weight_scale": torch.zeros(64, 4, dtype=U8),
        },
        64 * 128,
        8.25,
    ),
    "osc": (
        {
            f"{Q}.weight_packed": torch.zeros(64, 64, dtype=U8),
            f"{Q}.weight_scale": torch.zeros(64, 4, dtype=U8),
            f"{Q}.outlier_weight": torch.zeros(64, 16, dtype=BF16),
            f"{Q}.outlier_index": torch.zeros(16, dtype=torch.int32),
        },
        64 * 128,
        4.25 + 16 * 16 / 128 + 16 * 32 / (64 * 128),
    ),
    "residual": (
        {
            f"{Q}.weight_packed": torch.zeros(64, 80, dtype=U8),
            f"{Q}.weight_scale": torch.zeros(64, 5, dtype=U8),
            f"{Q}.outlier_index": torch.zeros(32, dtype=torch.int32),
        },
        64 * 128,
        4.25 * 160 / 128 + 32 * 32 / (64 * 128),
    ),
    "modelopt nvfp4": (
        {
            f"{Q}.weight": torch.zeros(64, 64, dtype=U8),
            f"{Q}.weight_scale": torch.zeros(64, 8, dtype=F8),
            f"{Q}.weight_scale_2": torch.zeros(()),
            f"{Q}.input_scale": torch.zeros(()),
        },
        64 * 128,
        4.5 + 64 / (64 * 128),
    ),
    "int4 with a padded shape": (
        {
            f"{Q}.weight_packed": torch.zeros(60, 16, dtype=torch.int32),
            f"{Q}.weight_scale": torch.zeros(60, 1, dtype=BF16),
            f"{Q}.weight_shape": torch.tensor([60, 127]),
        },
        60 * 127,
        8 * (60 * 16 * 4 + 60 * 2 + 16) / (60 * 127),
    ),
    "fused experts": (
        {
            f"{EXPERTS}.down_proj": torch.zeros(4, 64, 32, dtype=BF16),
        },
        4 * 64 * 32,
        16.0,
    ),
    "packed fused experts": (
        {
            f"{EXPERTS}.down_proj_blocks": torch.zeros(4, 64, 1, 16, dtype=U8),
            f"{EXPERTS}.down_proj_scales": torch.zeros(4, 64, 1, dtype=U8),
            f"{EXPERTS}.down_proj_bias": torch.zeros(4, 64, dtype=BF16),
        },
        4 * 64 * 32,
        4.25,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_what_lies_on_the_disk(tmp_path: Path, layout: str) -> None:
    tensors, weights, bits = LAYOUTS[layout]
    counted = sizes(open_checkpoint(stored(tmp_path, tensors)))
    assert [part.weights for part in counted.linears] == [weights]
    assert counted.linear_bits == pytest.approx(bits, rel=1e-12)


def test_only_decoder_linears_count_as_linears(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(50, 8),
        "model.layers.0.input_layernorm.weight": torch.zeros(8),
        "model.layers.0.mlp.gate.weight": torch.zeros(4, 8),
        f"{Q}.weight": torch.zeros(8, 8, dtype=BF16),
        f"{Q}.bias": torch.zeros(8),
        f"{DOWN}.weight": torch.zeros(8, 16, dtype=BF16),
        "lm_head.weight": torch.zeros(50, 8),
    }
    counted = sizes(open_checkpoint(stored(tmp_path, tensors)))
    assert [(p.kind, p.count, p.weights, p.nbytes) for p in counted.linears] == [
        ("attn_in", 1, 64, 128),
        ("mlp_out", 1, 128, 256),
    ]
    assert counted.parameters == sum(t.numel() for t in tensors.values())
    assert counted.nbytes == sum(t.numel() * t.itemsize for t in tensors.values())


OURS = {
    "quant_method": "quantkit",
    "sites": {
        "attn_in": {
            "weights": "mxfp4",
            "activations": "mxfp4",
            "branch": "bf16",
            "hadamard": {"block": 32},
        },
        "mlp_out": {"weights": "mxfp8", "activations": "mxfp8", "branch": None, "hadamard": None},
    },
    "overrides": {"layers.0.mlp_out": {"weights": "mxfp4", "activations": "mxfp4"}},
}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (OURS, ["mxfp4 + bf16 branch, Hadamard 32", "mxfp8; 1 sites mxfp4"]),
        (
            {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
            ["compressed-tensors mxfp4-pack-quantized"] * 2,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["modelopt NVFP4"] * 2),
        ({"quant_method": "gptq", "bits": 4}, ["gptq 4 bits"] * 2),
        ({"quant_method": "quantkit", "sites": 3, "overrides": []}, ["not quantized"] * 2),
        ({"quant_method": "quantkit", "sites": {"attn_in": []}}, ["not quantized"] * 2),
        ({}, ["unknown"] * 2),
        (None, ["bfloat16"] * 2),
    ],
    ids=str,
)
def test_formats_in_words(tmp_path: Path, section: Any, words: list[str]) -> None:
    tensors = {f"{Q}.weight": torch.zeros(8, 8), f"{DOWN}.weight": torch.zeros(8, 8)}
    stored(tmp_path, tensors, quantization_config=section, dtype="bfloat16")
    data = inspect(open_checkpoint(tmp_path))
    assert [site["format"] for site in data["sites"]] == words
    assert all(word in as_text(data) for word in words)


def test_a_strangers_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    stored(
        tmp_path,
        {f"{Q}.weight": torch.zeros(8, 8)},
        architectures=["\x1b[2J\u202eevil"],
        dtype="\x1b[31m",
        num_hidden_layers="many",
        auto_map={"AutoModel": "evil.Model"},
    )
    text = as_text(inspect(open_checkpoint(tmp_path)))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "never runs it" in text
