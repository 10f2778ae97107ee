"""Inputs of decoding steps, whose mask the step makes, beside those of transformers, on a CPU."""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList, StaticCache

from quantkit.runtime import attention, step_inputs
from tests.runtime import test_decode
from tests.runtime.test_decode import RunAgain, model_of, reason, tokens

GRAPHS = test_decode._graphs  # the fixture, for this file too


@pytest.fixture(autouse=True)
def _sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as transformers has it, so that numbers are equal."""
    monkeypatch.setattr(attention, "one_token_attention", lambda config: nullcontext())


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every step whose inputs come from here: the places of the mask."""
    found: list[int] = []
    inputs = step_inputs.Steps.inputs

    def watched(self: step_inputs.Steps, *args: Any) -> Any:
        arguments = inputs(self, *args)
        found.append(arguments["attention_mask"].shape[1])
        return arguments

    monkeypatch.setattr(step_inputs.Steps, "inputs", watched)
    return found


def padded() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 0), mask


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    config = CompileConfig()
    config._compile_all_devices = True
    torch.manual_seed(5)
    usual = {
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "output_logits": True,
        "compile_config": config,
    }
    return model.generate(ids, attention_mask=mask, **(usual | options))


def assert_equal(found: Any, want: Any) -> None:
    assert torch.equal(found.sequences, want.sequences)
    assert len(found.logits) == len(want.logits)
    for step, (one, other) in enumerate(zip(found.logits, want.logits, strict=True)):
        assert torch.equal(one, other), step


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("padding", [True, False])
def test_logits_are_those_of_transformers_inputs(
    family: str, padding: bool, prepared: list[int]
) -> None:
    model = model_of(family)
    ids, mask = padded() if padding else (tokens(3, 7), torch.ones(3, 7, dtype=torch.long))
    found = generate(model, ids, mask)
    assert reason(model) == ""
    assert len(prepared) == 8
    assert len(set(prepared)) == 1
    assert_equal(found, generate(model, ids, mask, disable_compile=True))
    assert len(prepared) == 8, "the steps of others are left alone"
    (graph,) = RunAgain.made
    assert graph.replays == 7


def test_sampling_and_sequences_that_end(prepared: list[int]) -> None:
    model = model_of()
    ids, mask = padded()
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 24}
    first = generate(model, ids, mask, **options).sequences
    options["eos_token_id"] = [int(first[0, 10]), int(first[1, 13])]  # ends rows at their times
    del prepared[:]
    found = generate(model, ids, mask, **options)
    assert reason(model) == ""
    assert (found.sequences[0] == 0).sum() > 3
    assert_equal(found, generate(model, ids, mask, disable_compile=True, **options))
    assert len(prepared) == len(found.logits) - 1


def test_a_cache_that_goes_on(prepared: list[int]) -> None:
    model = model_of()
    ids, mask = padded()
    found = []
    for options in ({}, {"disable_compile": True}):
        cache = StaticCache(config=model.config, max_cache_len=40)
        kept = {"past_key_values": cache, "cache_implementation": None} | options
        first = generate(model, ids, mask, **kept).sequences
        more = torch.cat([mask, torch.ones(3, 9, dtype=torch.long)], 1)
        found.append(generate(model, first, more, **kept))
    assert_equal(*found)
    assert prepared == [40] * 16


def test_a_cache_changed_between_steps() -> None:
    """A processor of logits may reach the cache; a tensor replaced is seen at once."""
    model = model_of()
    ids, mask = padded()
    found = []
    for options in ({}, {"disable_compile": True}):
        cache = StaticCache(config=model.config, max_cache_len=40)
        count = []

        def change(seen: Tensor, scores: Tensor, cache: Any = cache, count: Any = count) -> Tensor:
            count.append(1)
            if len(count) == 5:
                cache.layers[1].values = cache.layers[1].values * 2
            return scores

        kept = {"past_key_values": cache, "cache_implementation": None} | options
        found.append(
            generate(model, ids, mask, logits_processor=LogitsProcessorList([change]), **kept)
        )
    assert_equal(*found)
    assert len(RunAgain.made) == 2


@pytest.mark.parametrize(
    ("options", "many"),
    [
        ({"prefill_chunk_size": 4}, 0),
        ({"use_cache": True, "logits_to_keep": 1}, 8),
        ({"num_beams": 2, "output_logits": False, "return_dict_in_generate": False}, 0),
        ({"cache_implementation": None}, 0),
        ({"position_ids": torch.arange(7).repeat(3, 1)}, 8),
    ],
)
def test_what_generate_is_asked_for(
    options: dict[str, Any], many: int, prepared: list[int]
) -> None:
    model = model_of()
    ids, mask = padded()
    found = generate(model, ids, mask, **options)
    assert len(prepared) == many
    want = generate(model, ids, mask, disable_compile=True, **options)
    if isinstance(found, Tensor):
        assert torch.equal(found, want)
    else:
        assert_equal(found, want)


def test_models_with_inputs_of_their_own(
    monkeypatch: pytest.MonkeyPatch, prepared: list[int]
) -> None:
    model = model_of()
    ids, mask = padded()
    usual = type(model).prepare_inputs_for_generation
    wrapped = functools.wraps(usual)(lambda self, *args, **more: usual(self, *args, **more))
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", wrapped)
    generate(model, ids, mask)
    assert reason(model) == ""
    assert not prepared
    monkeypatch.undo()
    model.config._attn_implementation = "eager"
    generate(model, ids, mask)
    assert not prepared


def test_a_generate_that_is_left_is_not_prepared_for(
    monkeypatch: pytest.MonkeyPatch, prepared: list[int]
) -> None:
    model = model_of()
    ids, mask = padded()
    generate(model, ids, mask)
    assert len(prepared) == 8
    monkeypatch.setenv("QUANTKIT_DECODE", "transformers")
    generate(model, ids, mask)
    assert len(prepared) == 8


def test_it_looks_like_the_models_method() -> None:
    model = model_of()
    theirs = type(model).prepare_inputs_for_generation.__get__(model)
    assert inspect.signature(model.prepare_inputs_for_generation) == inspect.signature(theirs)
    twin = copy.deepcopy(model)
    assert twin.prepare_inputs_for_generation._model() is twin
    made = model.prepare_inputs_for_generation(tokens(2, 4), is_first_iteration=True)
    assert made.keys() == theirs(tokens(2, 4), is_first_iteration=True).keys()


def test_steps_die_with_their_cache() -> None:
    model = model_of()
    ids, mask = padded()
    output = generate(model, ids, mask)
    steps = model.prepare_inputs_for_generation._steps
    assert len(steps) == 1
    del output
    assert not steps


def test_the_mask_is_compiled_with_the_step_and_once(
    monkeypatch: pytest.MonkeyPatch, prepared: list[int]
) -> None:
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(inputs)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda call, **options: COMPILE(call, backend=backend, fullgraph=True)
    )
    model = model_of()
    ids, mask = padded()
    found = generate(model, ids, mask)
    assert len(made) == 1
    assert len(prepared) == 8
    for rows in (ids, ids.flip(0)):
        again = generate(model, rows, mask)
        assert len(made) == 1
        assert reason(model) == ""
    monkeypatch.setattr(step_inputs, "usual", lambda model: False)
    other = model_of()
    assert_equal(found, generate(other, ids, mask))
    assert_equal(again, generate(other, ids.flip(0), mask))
    assert len(made) == 2
    assert len(prepared) == 24
    torch._dynamo.reset()


COMPILE = torch.compile
