"""Depth registers and the sink: an ordinary causal language model to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from tests.tiny import tiny_config


def register_model(**changes: object) -> torch.nn.Module:
    from quantkit.model.depth_registers import DepthRegisterConfig, DepthRegisterForCausalLM

    plain = tiny_config("llama").to_dict()
    plain.pop("model_type")
    options = {"num_registers": 3, "attention_sink": True, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DepthRegisterForCausalLM(DepthRegisterConfig(**plain, **options)).eval()


IDS = torch.arange(40).reshape(2, 20) * 5 % 256


def test_no_token_sees_a_later_one() -> None:
    model = register_model()
    changed = IDS.clone()
    changed[:, 10] = 7
    with torch.no_grad():
        difference = (model(changed).logits - model(IDS).logits).abs().amax((0, 2))
    assert difference[:10].eq(0).all()
    assert difference[10:].gt(0).all()


def test_registers_and_sink_are_read() -> None:
    model = register_model()
    with torch.no_grad():
        before = model(IDS).logits
        for name in ("registers", "sink_key"):
            parameter = getattr(model.model.layers[0].self_attn, name)
            saved = parameter.clone()
            parameter.mul_(2.0)
            assert not torch.equal(model(IDS).logits, before), name
            parameter.copy_(saved)


def test_cached_and_masked_passes_equal_the_whole_one() -> None:
    model = register_model()
    with torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :15], use_cache=True)
        rest = model(IDS[:, 15:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 15:], rtol=1e-5, atol=1e-6)
        mask = torch.ones_like(IDS)
        mask[0, :4] = 0
        other = model(IDS, attention_mask=mask).logits[1]
    torch.testing.assert_close(other, whole[1], rtol=1e-5, atol=1e-6)


def test_without_registers_and_sink_it_is_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = register_model(num_registers=0, attention_sink=False)
    config = model.config.to_dict()
    config.pop("model_type")
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    llama.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(llama(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("sink", [False, True])
def test_block_by_block_equals_the_whole_model(tmp_path: Path, sink: bool) -> None:
    model = register_model(attention_sink=sink)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    layout = describe(checkpoint.config, checkpoint.tensors)
    runner = BlockRunner(checkpoint, layout)
    hidden = runner.embed(IDS)
    for i in range(layout.n_layers):
        hidden = runner.forward(runner.load(i), hidden)
    with torch.no_grad():
        assert torch.equal(runner.head(hidden), model(IDS).logits)
