"""Attention of one token: against float64, against sdpa, and what it leaves to sdpa."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.runtime import attention
from tests.tiny import tiny_model

SHAPES = [(1, 4, 2, 16, 7), (3, 9, 3, 64, 40), (2, 32, 8, 128, 33)]


def operands(
    batch: int, heads: int, kv: int, width: int, length: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.rand(batch, 1, 1, length, generator=generator) < 0.7
    mask[..., -2] = True
    query = draw(batch, heads, 1, width)
    return *(x.to(dtype) for x in (query, *draw(2, batch, kv, length, width))), mask


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[b, 1, heads, d] in float64, head by head."""
    group = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        q, k, v = query[:, h].double(), key[:, h // group].double(), value[:, h // group].double()
        scores = (q @ k.mT) * scale
        seen = mask[:, 0]
        scores = (
            scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        )
        heads.append(scores.softmax(-1) @ v)
    return torch.stack(heads, 1).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("additive", [False, True])
def test_one_token_is_attention(shape: tuple[int, ...], additive: bool) -> None:
    query, key, value, mask = operands(*shape)
    if additive:
        mask = torch.where(mask, 0.5, torch.finfo(torch.float32).min)
    got = attention.one_token(query, key, value, mask, 0.25)
    want = exact(query, key, value, mask, 0.25)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_near_as_sdpa_in_bfloat16(shape: tuple[int, ...]) -> None:
    query, key, value, mask = operands(*shape, torch.bfloat16)
    module: Any = SimpleNamespace(num_key_value_groups=shape[1] // shape[2])
    want = exact(query, key, value, mask, shape[3] ** -0.5)
    with torch.no_grad():
        got, weights = attention.attend(module, query, key, value, mask)
        theirs, _ = attention.sdpa_attention_forward(module, query, key, value, mask)
    assert weights is None
    assert got.shape == theirs.shape
    assert (got - want).norm() < 1.5 * max((theirs - want).norm(), want.norm() / 512)


@pytest.mark.parametrize(
    "change",
    [
        {"query": 3},
        {"mask": None},
        {"dropout": 0.5},
        {"position_bias": torch.zeros(1)},
        {"s_aux": torch.zeros(4)},
        {"output_attentions": True},
        {"heads": 2},
        {"mask": torch.ones(1, 4, 1, 7, dtype=torch.bool)},
    ],
)
def test_what_is_left_to_sdpa(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, mask = operands(1, change.pop("heads", 4), 2, 16, 7)
    query = query.expand(-1, -1, change.pop("query", 1), -1)
    mask = change.pop("mask", mask)
    said = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **k: said.append((a, k)) or (a[1], None)
    )
    with torch.no_grad():
        attention.attend(None, query, key, value, mask, scaling=0.5, sliding_window=None, **change)  # type: ignore[arg-type]
    (((_, given, *_), options),) = said
    assert given is query
    assert options == {"dropout": 0.0, "scaling": 0.5, "sliding_window": None} | change


def test_it_compiles_whole() -> None:
    query, key, value, mask = operands(*SHAPES[0])
    torch._dynamo.reset()
    compiled = torch.compile(attention.attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got, _ = compiled(None, query, key, value, mask, scaling=0.25)
        want, _ = attention.attend(None, query, key, value, mask, scaling=0.25)  # type: ignore[arg-type]
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_model_attends_by_it_only_within(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import StaticCache

    calls = []
    one_token = attention.one_token
    monkeypatch.setattr(attention, "one_token", lambda *a: calls.append(1) or one_token(*a))
    model = tiny_model(family, attn_implementation="sdpa")
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    seen = torch.ones(2, 12, dtype=torch.bool)
    seen[0, :2] = False

    def two_steps() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=12)
        mask = seen.clone()
        model(ids, attention_mask=seen[:, :5].long(), past_key_values=cache)
        mask[:, 6:] = False
        given: Any = mask[:, None, None]
        step = torch.tensor([[8], [9]])
        place = torch.tensor([[3], [5]])
        return model(step, attention_mask=given, position_ids=place, past_key_values=cache).logits

    with torch.no_grad():
        want = two_steps()
        assert not calls
        with attention.one_token_attention(model.config):
            got = two_steps()
    assert model.config._attn_implementation == "sdpa"
    assert calls
    assert (got - want).norm() < 1e-5 * want.norm()


def test_other_implementations_stay() -> None:
    model = tiny_model("llama", attn_implementation="eager")
    with attention.one_token_attention(model.config):
        assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="x"), attention.one_token_attention(model.config):
        raise ValueError("x")
    assert model.config._attn_implementation == "eager"
