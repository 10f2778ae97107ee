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
    decode.install(model)
    return model


def plain_model() -> Any:
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=512, head_dim=64)
    model = model.to("cuda", torch.bfloat16)
    decode.install(model)
    return model


def generate(model: Any, ids: Tensor, steps: int = STEPS, **options: Any) -> Any:
    """Greedy, with two places of padding in front of the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, :2] = len(ids) == 1
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **({"cache_implementation": "static"} | options),
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
    for batch in (ids, ids.flip(1)[:1]):
        assert torch.equal(ours(model, batch), theirs(model, batch))


@pytest.mark.usefixtures("sdpa")
def test_generate_again() -> None:
    """Other prompts and lengths; the same shapes compile nothing, and caches are not kept."""
    model = model_of("mxfp4", "bf16")
    ids = tokens(2, 9)
    long = ours(model, ids, 40)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    held = []
    for prompt, steps in [(ids.flip(0), 40), (ids, 20), (ids, 40), (ids[:, 3:], 43)]:
        held.append(ours(model, prompt, steps))
        held.append(torch.cuda.memory_allocated())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not model.get_compiled_call._records
    assert torch.equal(held[4], long)
    assert torch.equal(held[2], long[:, :29])
    assert torch.equal(held[0], theirs(model, ids.flip(0), 40))
    assert max(held[3::2]) <= held[1] + 4096  # what is kept of a call is its tokens


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_logits_of_all_steps_are_kept_apart(kind: str) -> None:
    model = plain_model() if kind == "plain" else model_of("mxfp4", "bf16")
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
    assert len({step.data_ptr() for step in found.logits}) == STEPS
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
    assert model.get_compiled_call.reason
    assert len(found.hidden_states) == STEPS
    assert torch.equal(found.sequences, ours(model, ids))


@pytest.mark.usefixtures("sdpa")
def test_what_cannot_be_captured_comes_from_transformers() -> None:
    model = plain_model()
    ids = tokens(2, 9)
    want = ours(model, ids)
    norm = model.model.norm

    def synchronized(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        torch.cuda.synchronize()
        return type(norm).forward(norm, x)

    norm.forward = synchronized
    found = generate(model, ids)
    assert model.get_compiled_call.reason.startswith("no CUDA graph")
    assert torch.equal(found, want)
    del norm.forward
    assert torch.equal(ours(model, ids), want)


@pytest.mark.usefixtures("sdpa")
def test_threads_and_streams() -> None:
    model = plain_model()
    prompts = [tokens(2, 9), tokens(2, 9).flip(0)]
    want = [ours(model, ids) for ids in prompts]
    found: list[list[Tensor]] = [[], []]

    def run(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                found[which].append(generate(model, prompts[which]))
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert len(found[which]) == 4
        assert all(torch.equal(tokens, want[which]) for tokens in found[which])
