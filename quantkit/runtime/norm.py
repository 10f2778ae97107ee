"""An RMSNorm that only packed linears read: computed inside their activation kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.mlp import PackedMlp
from quantkit.runtime.site import PackedSite

# Families of transformers in whose blocks a norm's output goes to the linears of one site and
# nowhere else, each linear once, and whose norm is gain * round(x * rsqrt(mean(x^2) + epsilon)).
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}


class SiteNorm(nn.Module):
    """Takes the place of a norm before a packed site, with the parameter it had.

    Where the site's kernel can normalise, x is handed on as it is, and the site is told so;
    otherwise (reference, CPU, gradients, someone who looks at what passes between the two) the
    norm is computed as before. `watched`: the modules that x passes on its way to the kernel.
    """

    def __init__(self, norm: Any, site: PackedSite, watched: list[nn.Module]) -> None:
        super().__init__()
        self.kind = type(norm)
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self.site: PackedSite | None = site  # None: always as before
        self.watched = tuple(watched)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [.., hidden] -> its norm, or x itself for the site to normalise."""
        if self.site is not None and not torch.is_grad_enabled() and not self._seen():
            handed = self.site.hand_on(hidden_states, self.weight, self.variance_epsilon)
            if handed is not None:
                return handed
        normed: Tensor = self.kind.forward(self, hidden_states)
        return normed

    def _seen(self) -> bool:
        # Hooks would see numbers that are not the norm's. Blocks call attention with keywords,
        # which ordinary forward hooks (transformers' own, on outputs) are not given.
        if self._forward_hooks:
            return True
        first, *linears = self.watched
        inputs = first._forward_hooks_with_kwargs or first._forward_pre_hooks
        if isinstance(first, PackedMlp):
            inputs = inputs or first._forward_hooks
        return bool(inputs) or any(m._forward_hooks or m._forward_pre_hooks for m in linears)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def fuse(block: Any) -> None:
    """Replace the norms of a decoder block whose consumers are all known and packed.

    The block, the norm and what reads it must be of transformers' very classes; in a mixture the
    norm before the router stays.
    """
    family = next((f for f, name in FAMILIES.items() if _is(block, f, name + "DecoderLayer")), None)
    if family is None:
        return
    name = FAMILIES[family]
    attention, mlp = block.self_attn, block.mlp
    if _is(attention, family, name + "Attention"):
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        _replace(block, "input_layernorm", family, attention, linears)
    if isinstance(mlp, PackedMlp) or _is(mlp, family, name + "MLP"):
        gate: Any = mlp.gate_proj
        _replace(block, "post_attention_layernorm", family, mlp, [gate, mlp.up_proj])


def _replace(block: Any, at: str, family: str, reader: nn.Module, linears: list[Any]) -> None:
    norm, first = getattr(block, at), linears[0]
    if not _is(norm, family, FAMILIES[family] + "RMSNorm"):
        return
    if isinstance(first, QuantLinear) and first.site.members == linears:
        setattr(block, at, SiteNorm(norm, first.site, [reader, *linears]))


def _is(module: nn.Module, family: str, name: str) -> bool:
    kind = type(module)
    where = f"transformers.models.{family}.modeling_{family}"
    return (kind.__module__, kind.__qualname__) == (where, name)
