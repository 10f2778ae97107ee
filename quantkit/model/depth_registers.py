"""A Llama decoder with depth registers and an attention sink; our own formulation.

The abstract of arXiv 2604.18128 names "depth registers" and a "sink" and gives no definition.
Ours: layer `l` holds `num_registers` learned vectors in residual space, `R_l` [k, hidden]. Its
attention reads them as `k` extra positions, keys `R_l W_k^T` and values `R_l W_v^T` by the layer's
own projections, without rotary embedding and visible to every token. The sink is one more position
with a learned key and a value of zero: attention can spend weight there and write nothing.

With neither, the model is a plain Llama and is saved as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

MODEL_TYPE = "depth_register_llama"


class DepthRegisterConfig(LlamaConfig):
    """A Llama config with `num_registers` (per layer) and `attention_sink`."""

    model_type = MODEL_TYPE
    num_registers: int = 0
    attention_sink: bool = False


class DepthRegisterAttention(LlamaAttention):
    """Causal attention over the tokens, the layer's registers and its sink."""

    def __init__(self, config: DepthRegisterConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.num_registers:
            self.registers = nn.Parameter(torch.randn(config.num_registers, config.hidden_size))
        if config.attention_sink:
            heads = config.num_key_value_heads or config.num_attention_heads
            self.sink_key = nn.Parameter(0.1 * torch.randn(heads, int(self.head_dim)))

    def slots(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, kv heads, registers + sink, head_dim] before every token."""
        heads, width = self.config.num_key_value_heads, self.head_dim
        keys, values = [], []
        if self.config.num_registers:
            keys.append(self.k_proj(self.registers).view(-1, heads, width).transpose(0, 1))
            values.append(self.v_proj(self.registers).view(-1, heads, width).transpose(0, 1))
        if self.config.attention_sink:
            keys.append(self.sink_key[:, None])
            values.append(torch.zeros_like(keys[-1]))
        key, value = (torch.cat(parts, 1) for parts in (keys, values))
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)

    def forward(  # type: ignore[override]  # the base names every backend's keyword
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention output [batch, tokens, hidden]; the cache holds tokens only."""
        assert position_embeddings is not None
        batch, tokens, _ = hidden_states.shape
        slot_key, slot_value = self.slots(batch)
        shape = (batch, tokens, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        seen = key.shape[2]
        slots = slot_key.shape[2]
        key = torch.cat([slot_key.to(key.dtype), key], 2)
        value = torch.cat([slot_value.to(value.dtype), value], 2)
        if attention_mask is None:
            mask = torch.ones(tokens, slots + seen, dtype=torch.bool, device=key.device)
            mask = mask.tril(slots + seen - tokens)
        else:  # every slot is visible: 0 in an additive mask, True in a boolean one
            visible = float(attention_mask.dtype == torch.bool)
            mask = F.pad(attention_mask[..., :seen], (slots, 0), value=visible)
        output = F.scaled_dot_product_attention(
            query, key, value, mask, scale=self.scaling, enable_gqa=self.num_key_value_groups > 1
        )
        return self.o_proj(output.transpose(1, 2).reshape(batch, tokens, -1)), None


class DepthRegisterForCausalLM(LlamaForCausalLM):
    """Llama whose attention modules carry registers and a sink."""

    config_class = DepthRegisterConfig

    def __init__(self, config: DepthRegisterConfig) -> None:
        super().__init__(config)
        if config.num_registers or config.attention_sink:
            for index, layer in enumerate(self.model.layers):
                layer.self_attn = DepthRegisterAttention(config, index)
            self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthRegisterAttention):
            if module.config.num_registers:
                nn.init.normal_(module.registers)  # unit RMS, as a normed token has
            if module.config.attention_sink:
                nn.init.normal_(module.sink_key, std=0.1)


def register() -> None:
    """Make the Auto classes of transformers know the model type."""
    AutoConfig.register(MODEL_TYPE, DepthRegisterConfig, exist_ok=True)
    AutoModelForCausalLM.register(DepthRegisterConfig, DepthRegisterForCausalLM, exist_ok=True)
