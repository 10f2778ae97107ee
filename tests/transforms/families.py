"""The models every transform is tested on."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import VOCAB

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "registers": (
        "depth_register_llama",
        {"num_registers": 3, "attention_sink": True, "tie_word_embeddings": True},
    ),
}


def tokens(samples: int = 2, length: int = 24, seed: int = 7) -> torch.Tensor:
    """Random token ids [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (samples, length), generator=generator)
