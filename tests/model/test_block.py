"""Block after block must be the model itself, and every site must see what its linears see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.errors import InputRejected
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import read_weight
from tests.model.stand_in import MemoryCheckpoint
from tests.tiny import VOCAB, save_tiny

# Windows shorter than the sequence, mixed layer types, scaled embeddings, soft caps: each family
# in the form that leaves most to its own forward.
FAMILIES: dict[str, dict[str, object]] = {
    "depth_register_llama": {"num_registers": 3, "attention_sink": True},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {},
    "phi3": {"pad_token_id": 0},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 8},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 8},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
}


def open_tiny(path: Path, family: str, **changes: object) -> tuple[MemoryCheckpoint, BlockRunner]:
    checkpoint = MemoryCheckpoint(save_tiny(path, family, **(FAMILIES[family] | changes)))
    return checkpoint, BlockRunner(checkpoint, describe(checkpoint.config, checkpoint.tensors))


def whole_model(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    ).eval()


def tokens(batch: int = 3, sequence: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (batch, sequence), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_equal_the_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    _, runner = open_tiny(tmp_path, family)
    hidden = runner.embed(tokens())
    for i in range(runner.layout.n_layers):
        block = runner.load(i)
        shown = runner.capture(block, i, hidden, lambda site, x: None)
        hidden = runner.forward(block, hidden)
        assert torch.equal(shown, hidden)
    with torch.no_grad():
        expected = whole_model(tmp_path)(tokens()).logits
    assert torch.equal(runner.head(hidden), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_inputs_of_their_linears(family: str, tmp_path: Path) -> None:
    """Inputs caught by hooks on the whole model equal what `capture` shows (dense sites)."""
    _, runner = open_tiny(tmp_path, family)
    model, expected, seen = whole_model(tmp_path), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: expected.__setitem__(name, inputs[0].flatten(0, -2))
            )
    hidden = runner.embed(tokens())
    with torch.no_grad():
        model(tokens())
    for i in range(runner.layout.n_layers):
        hidden = runner.capture(
            runner.load(i), i, hidden, lambda site, x: seen.__setitem__(site.key, x.clone())
        )
    compared = 0
    for site in runner.layout.sites:
        for linear in site.linears:
            if linear.module in expected:
                assert torch.equal(seen[site.key], expected[linear.module]), linear.module
                compared += 1
    assert compared == len(expected)  # every nn.Linear of the blocks belongs to a site
    assert seen.keys() <= runner.layout.by_key.keys()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_expert_inputs(family: str, tmp_path: Path) -> None:
    """Each expert is shown exactly the tokens routed to it, or all of them when asked."""
    checkpoint, runner = open_tiny(tmp_path, family)
    seen: dict[str, torch.Tensor] = {}
    every: dict[str, torch.Tensor] = {}
    hidden, block = runner.embed(tokens()), runner.load(0)
    out = runner.capture(block, 0, hidden, lambda site, x: seen.__setitem__(site.key, x))
    again = runner.capture(
        block, 0, hidden, lambda site, x: every.__setitem__(site.key, x), every_expert=True
    )
    assert torch.equal(out, again)
    n, routed = tokens().numel(), 0
    for site in runner.layout.layer_sites(0):
        if site.expert is None:
            continue
        gate, up = (
            torch.nn.functional.linear(seen["layers.0.mlp_in"], read_weight(checkpoint, linear))
            for linear in runner.layout.by_key["layers.0.mlp_in"].linears[
                2 * site.expert : 2 * site.expert + 2
            ]
        )
        torch.testing.assert_close(every[site.key], torch.nn.functional.silu(gate) * up)
        if site.key in seen:
            routed += len(seen[site.key])
            assert len(seen[site.key]) <= n
    assert routed == 2 * n  # two experts a token


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_both_expert_layouts_on_disk(family: str, tmp_path: Path) -> None:
    checkpoint, runner = open_tiny(tmp_path, family)
    fused = MemoryCheckpoint(tmp_path)
    model = whole_model(tmp_path)
    fused.weights = {k: v.detach() for k, v in model.state_dict().items()}
    other = BlockRunner(fused, describe(fused.config, fused.tensors))
    assert [s.key for s in other.layout.sites] == [s.key for s in runner.layout.sites]
    assert not other.layout.unmatched
    assert not runner.layout.unmatched
    hidden = runner.embed(tokens())
    assert torch.equal(runner.forward(runner.load(1), hidden), other.forward(other.load(1), hidden))
    for a, b in zip(runner.layout.linears(), other.layout.linears(), strict=True):
        assert torch.equal(read_weight(checkpoint, a), read_weight(fused, b))


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "phi3"])
def test_override_replaces_any_linear(family: str, tmp_path: Path) -> None:
    checkpoint, runner = open_tiny(tmp_path, family)
    hidden = runner.embed(tokens())
    for linear in {x.module: x for s in runner.layout.layer_sites(0) for x in s.linears}.values():
        weight = read_weight(checkpoint, linear)
        name = f"{linear.module}.weight"
        same = runner.load(0, override={name: weight})
        assert torch.equal(runner.forward(same, hidden), runner.forward(runner.load(0), hidden))
        changed = runner.load(0, override={name: torch.zeros_like(weight)})
        assert not torch.equal(
            runner.forward(changed, hidden), runner.forward(runner.load(0), hidden)
        )


def test_prefetched_blocks_are_the_same(tmp_path: Path) -> None:
    _, runner = open_tiny(tmp_path, "llama")
    runner.prefetch(1)
    ahead, direct = runner.load(1), runner.load(1)
    for a, b in zip(ahead.parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(save_tiny(tmp_path, "qwen3"))
    runner = BlockRunner(checkpoint, describe(checkpoint.config, checkpoint.tensors), dtype=dtype)
    hidden = runner.embed(tokens())
    for i in range(2):
        hidden = runner.forward(runner.load(i), hidden)
    with torch.no_grad():
        expected = whole_model(tmp_path, dtype)(tokens()).logits
    assert runner.head(hidden).dtype == dtype
    assert torch.equal(runner.head(hidden), expected)


def test_bad_weights_and_tokens_are_rejected(tmp_path: Path) -> None:
    checkpoint, runner = open_tiny(tmp_path, "llama")
    checkpoint.weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    with pytest.raises(InputRejected, match=r"layers\.1\.mlp\.up_proj"):
        runner.load(1)
    runner.prefetch(1)
    with pytest.raises(InputRejected, match=r"layers\.1\.mlp\.up_proj"):
        runner.load(1)
    with pytest.raises(InputRejected, match="vocabulary"):
        runner.embed(torch.tensor([[0, VOCAB]]))
