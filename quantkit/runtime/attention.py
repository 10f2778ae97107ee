"""Attention of a single new token: each key and value head is read once for its group of queries.

transformers' sdpa repeats K and V for every query head of a group when there is a mask, and a
static cache always has one. With one token a sequence the group can take the place of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "quantkit_grouped"  # in `config._attn_implementation`
# What sdpa acts on (or does not know) beyond q, k, v, mask and scale.
SPECIAL = ("position_bias", "cache", "softcap", "s_aux")


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [b, heads, 1, d], key and value [b, kv, L, d].

    Returns [b, 1, heads, d]. Anything but one token a sequence with a mask for all heads goes to
    transformers' sdpa unchanged.
    """
    special = any(kwargs.get(name) is not None for name in SPECIAL)
    if (
        special
        or kwargs.get("output_attentions")
        or not grouped(query, key, attention_mask, dropout)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    return one_token(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5), None


def grouped(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether `one_token` computes this."""
    return (
        query.shape[2] == 1
        and query.shape[1] > key.shape[1]
        and query.shape[1] % key.shape[1] == 0
        and mask is not None
        and mask.dim() == 4
        and mask.shape[1:] == (1, 1, key.shape[2])
        and not dropout
        and not torch.is_grad_enabled()
    )


def one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v: [b, heads, 1, d] -> [b, 1, heads, d].

    mask [b or 1, 1, 1, L]: bool (true: seen) or added. Sums and softmax are in float32, the
    probabilities are rounded to the values' dtype.
    """
    batch, heads, _, width = query.shape
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    scores = grouped_scores(
        query.reshape(batch * kv_heads, group, width), key.reshape(batch * kv_heads, length, width)
    )
    scores = scores.view(batch, kv_heads, group, length) * scale
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask.float()
    probabilities = scores.softmax(-1).to(value.dtype)
    output = torch.bmm(
        probabilities.view(batch * kv_heads, group, length),
        value.reshape(batch * kv_heads, length, value.shape[-1]),
    )
    return output.reshape(batch, 1, heads, value.shape[-1])


# An operator of its own, as inductor's lowering of `out_dtype` differs between versions of torch.
@torch.library.custom_op("quantkit::grouped_scores", mutates_args=())
def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """query [n, group, d] times key [n, L, d] transposed: float32 [n, group, L]."""
    if query.dtype == torch.float32 or not query.is_cuda:
        return torch.bmm(query.float(), key.float().mT)
    return torch.bmm(query, key.mT, out_dtype=torch.float32)


@grouped_scores.register_fake
def _(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1], dtype=torch.float32)


@contextmanager
def one_token_attention(config: Any) -> Iterator[None]:
    """Within, a model with this config attends by `attend` where it would by sdpa."""
    texts = {id(c): c for c in (config, config.get_text_config(decoder=True))}.values()
    swapped = [c for c in texts if c._attn_implementation == "sdpa"]
    try:
        for c in swapped:  # not through the property, which sets those of images and sounds too
            c._attn_implementation_internal = NAME
        yield
    finally:
        for c in swapped:
            c._attn_implementation_internal = "sdpa"


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
