"""Checkpoints of random weights in the shapes of real models, written quickly.

Every shape is drawn once and written as often as it occurs: what a step costs does not depend on
the values being different.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

SHARD = 2 * 10**9
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """The widths of a decoder; `experts` > 0 makes it a mixture with fused expert tensors."""

    hidden: int
    intermediate: int  # of the MLP, or of each expert
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 0
    chosen: int = 2  # experts of a token

    def config(self, layers: int) -> dict[str, Any]:
        """Its `config.json`."""
        config: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM" if self.experts else "LlamaForCausalLM"],
            "model_type": "qwen3_moe" if self.experts else "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.experts:
            config |= {
                "num_experts": self.experts,
                "num_experts_per_tok": self.chosen,
                "moe_intermediate_size": self.intermediate,
                "norm_topk_prob": True,
            }
        return config

    def block(self, layer: int) -> Shapes:
        """Names and shapes of one block's tensors."""
        at, hidden, wide = f"model.layers.{layer}.", self.hidden, self.intermediate
        kv = hidden // self.heads * self.kv_heads
        shapes: Shapes = {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
        if not self.experts:
            return shapes | {
                f"{at}mlp.gate_proj.weight": (wide, hidden),
                f"{at}mlp.up_proj.weight": (wide, hidden),
                f"{at}mlp.down_proj.weight": (hidden, wide),
            }
        head = hidden // self.heads
        return shapes | {
            f"{at}self_attn.q_norm.weight": (head,),
            f"{at}self_attn.k_norm.weight": (head,),
            f"{at}mlp.gate.weight": (self.experts, hidden),
            f"{at}mlp.experts.gate_up_proj": (self.experts, 2 * wide, hidden),
            f"{at}mlp.experts.down_proj": (self.experts, hidden, wide),
        }

    def shapes(self, layers: int) -> Shapes:
        """Names and shapes of all tensors."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(layers):
            found |= self.block(layer)
        return found | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }

    def layers(self, gigabytes: float) -> int:
        """The number of layers that makes a checkpoint of at most this size."""
        ends = self.shapes(0)
        each = sum(map(size_of, self.block(0).values()))
        return max(int((gigabytes * 1e9 - sum(map(size_of, ends.values()))) // each), 1)


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor."""
    return 2 * prod(shape)


def build(folder: Path, model: Model, layers: int, windows: tuple[int, int]) -> int:
    """Write `folder/model` and token ids `folder/tokens.safetensors` (`ids`); returns the bytes.

    `windows` is how many windows of how many tokens.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], bytes] = {}

    def values(shape: tuple[int, ...]) -> bytes:
        if shape not in drawn:
            if len(shape) == 1:
                tensor = torch.ones(shape)
            else:
                tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            drawn[shape] = tensor.bfloat16().view(torch.uint8).numpy().tobytes()
        return drawn[shape]

    shards: list[Shapes] = [{}]
    for name, shape in model.shapes(layers).items():
        if shards[-1] and sum(map(size_of, shards[-1].values())) + size_of(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    (folder / "model").mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, shape in shard.items():
            end = position + size_of(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position, weight_map[name] = end, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / "model" / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for shape in shard.values():
                out.write(values(shape))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model/config.json").write_text(json.dumps(model.config(layers)))
    ids = torch.randint(0, model.vocab, windows, generator=generator)
    save_file({"ids": ids}, folder / "tokens.safetensors")
    return sum(map(size_of, model.shapes(layers).values()))
