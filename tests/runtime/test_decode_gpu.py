"""`generate` through quantkit's decoding step on a GPU, beside transformers' own."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.runtime import attention, decode
from tests.runtime.test_gpu import _kernels, packed_model, tokens
from tests.tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unasked")]
OWN = _kernels  # the fixture that skips where there is no kernel, for this file too
FORMATS = [("mxfp4", None), ("mxfp4", "bf16"), ("nvfp4", "fp8")]
STEPS = 26


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the environment chooses the step."""
    monkeypatch.delenv("QUANTKIT_DECODE", raising=False)


@pytest.fixture
def sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as transformers has it, so that numbers are equal."""
    monkeypatch.setattr(attention, "one_token_attention", lambda config: nullcontext())


def model_of(weights: str, branch: str | None) -> Any:
    model = packed_model(branch, weights)
    shorten(model)
    decode.install(model)
    return model


def plain_model() -> Any:
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=512, head_dim=64)
    model = model.to("cuda", torch.bfloat16)
    shorten(model)
    decode.install(model)
    return model


def shorten(model: Any) -> None:
    """Leave one layer: it compiles soonest."""
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.config.layer_types = model.config.layer_types[:1]


def generate(model: Any, ids: Tensor, steps: int = STEPS, **options: Any) -> Any:
    """Greedy, with two places of padding in front of the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, :2] = len(ids) == 1
    return model.generate(
        ids,
        attention_mask=mask,
        eos_token_id=None,
        pad_token_id=0,
        **(
            {"max_new_tokens": steps, "do_sample": False, "cache_implementation": "static"}
            | options
        ),
    )


def ours(model: Any, *args: Any, **options: Any) -> Any:
    output = generate(model, *args, **options)
    assert model.get_compiled_call.reason == ""
    return output


def theirs(model: Any, *args: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_DECODE", "transformers")
        output = generate(model, *args, **options)
    assert model.get_compiled_call.reason == "QUANTKIT_DECODE=transformers"
    return output


@pytest.mark.usefixtures("sdpa")
@pytest.mark.parametrize(("weights", "branch"), FORMATS)
def test_tokens_are_those_of_transformers_step(weights: str, branch: str | None) -> None:
    model = model_of(weights, branch)
    ids = tokens(3, 9)
    assert torch.equal(ours(model, ids), theirs(model, ids))


@pytest.mark.usefixtures("sdpa")
def test_generate_again() -> None:
    """Other prompts and lengths; the same shapes compile nothing, and caches are not kept."""
    model = model_of("mxfp4", "bf16")
    ids = tokens(2, 9)
    long = ours(model, ids, 40)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    flipped, short = ours(model, ids.flip(0), 40), ours(model, ids, 20)
    again, other = ours(model, ids, 40), ours(model, ids[:, 3:], 43)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not model.get_compiled_call._records
    assert not model.prepare_inputs_for_generation._steps
    assert torch.equal(again, long)
    assert torch.equal(short, long[:, :29])
    assert other.shape == (2, 49)
    assert torch.equal(flipped, theirs(model, ids.flip(0), 40))


def test_memory_after_a_generate_is_that_before() -> None:
    model = plain_model()
    ids = tokens(2, 9)
    held = []
    for _ in range(4):
        ours(model, ids)
        gc.collect()  # transformers and what compiled the step leave cycles
        held.append(torch.cuda.memory_allocated())
    assert held[3] == held[2] == held[1]


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_logits_of_all_steps_are_kept_apart(kind: str) -> None:
    """Graph and compiled step, which no later step can change, give the same bits."""
    model = plain_model() if kind == "plain" else model_of("mxfp4", "bf16")
    ids = tokens(2, 9)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 10}
    found = ours(model, ids, **options)
    assert len({step.data_ptr() for step in found.logits}) == 10

    def run_again(self: Any, inputs: Any, cache: Any) -> Any:
        """The compiled step itself: what the graph has captured, without the graph."""
        with attention.one_token_attention(model.config):
            return self.warm_up(inputs, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.StepGraph, "replay", run_again)
        want = ours(model, ids, **options)
    assert torch.equal(found.sequences, want.sequences)
    for step, (one, other) in enumerate(zip(found.logits, want.logits, strict=True)):
        assert torch.equal(one, other), step


def test_logits_are_near_those_of_no_compilation() -> None:
    model = plain_model()
    ids = tokens(2, 9)
    options = {"return_dict_in_generate": True, "output_logits": True}
    with torch._inductor.config.patch(emulate_precision_casts=True):
        found = ours(model, ids, **options)
    mask = torch.ones_like(found.sequences)
    mask[0, :2] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(found.sequences, attention_mask=mask, position_ids=place).logits[:, 8:-1]
    got = torch.stack(found.logits, 1)
    for step in range(STEPS):
        error = (got[:, step] - want[:, step].float()).norm() / want[:, step].float().norm()
        assert error < 0.02, (step, error)


@pytest.mark.usefixtures("sdpa")
def test_a_cache_of_the_users_goes_on() -> None:
    from transformers import StaticCache

    model = model_of("mxfp4", None)
    ids = tokens(2, 9)
    found = {}
    for step in (ours, theirs):
        cache = StaticCache(config=model.config, max_cache_len=80)
        first = step(model, ids, past_key_values=cache, cache_implementation=None)
        more = torch.cat([first, ids], 1)
        found[step] = step(model, more, past_key_values=cache, cache_implementation=None)
        kept = model.get_compiled_call._records
        assert len(kept) == (step is ours)
        del cache
        gc.collect()  # what compiled the step leaves cycles
        assert not kept
    assert torch.equal(found[ours], found[theirs])


@pytest.mark.usefixtures("sdpa")
def test_more_outputs_come_from_transformers() -> None:
    model = plain_model()
    ids = tokens(2, 9)
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    found = generate(model, ids, **options)
    assert model.get_compiled_call.reason == "there are outputs beside the logits"
    assert len(found.hidden_states) == STEPS
    assert torch.equal(found.sequences, theirs(model, ids, **options).sequences)
    ours(model, ids)


@pytest.mark.usefixtures("sdpa")
def test_what_cannot_be_captured_comes_from_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.DecodingStep, "failed", "")
    model = plain_model()
    ids = tokens(2, 9)
    norm = model.model.norm

    def synchronized(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        torch.cuda.synchronize()
        return type(norm).forward(norm, x)

    norm.forward = synchronized
    found = generate(model, ids)
    assert model.get_compiled_call.reason.startswith("no CUDA graph")
    del norm.forward
    assert generate(model, ids).shape == found.shape
    assert model.get_compiled_call.reason.startswith("no CUDA graph"), "nor is the next one"
    sampled = generate(model, ids, do_sample=True)  # random numbers are not those of a capture
    assert sampled.shape == found.shape


@pytest.mark.usefixtures("sdpa")
def test_threads_and_streams() -> None:
    model = plain_model()
    prompts = [tokens(2, 9), tokens(2, 9).flip(0)]
    want = [ours(model, ids) for ids in prompts]
    found: list[list[Tensor]] = [[], []]

    def run(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found[which].append(generate(model, prompts[which]))
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert len(found[which]) == 3
        assert all(torch.equal(tokens, want[which]) for tokens in found[which])
