"""Which decoding steps quantkit takes from transformers, on a CPU: graphs run their step again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

import quantkit
from quantkit.errors import UsageError
from quantkit.pack.job import PackOptions
from quantkit.runtime import attention, decode, step_checks
from quantkit.runtime.step_graph import StepGraph
from tests.tiny import tiny_model


class NoTurns:
    """A device on which everything happens in order."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    @contextmanager
    def aside(self, current: None) -> Iterator[None]:
        yield


class RunAgain(StepGraph):
    """A graph whose replay runs the step on the graph's own inputs."""

    made: ClassVar[list[RunAgain]] = []
    fails = ""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replays, self.names = 0, sorted(self._arguments)
        RunAgain.made.append(self)

    @property
    def captured(self) -> bool:
        return self._kind is not None

    def capture(self, cache: Any) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self._kind = SimpleNamespace

    def replay(self, tensors: list[Tensor], cache: Any) -> Any:
        self.replays += 1
        self._fill(tensors)
        return self._call(**self._arguments, past_key_values=cache)


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps on a CPU are taken, not compiled, and graphs are those above."""
    monkeypatch.delenv("QUANTKIT_DECODE", raising=False)
    monkeypatch.setattr(RunAgain, "made", [])
    monkeypatch.setattr(decode, "StepGraph", RunAgain)
    monkeypatch.setattr(decode, "turns_of", lambda device: NoTurns())
    monkeypatch.setattr(step_checks, "check_device", lambda model: None)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    yield
    gc.collect()


def model_of(family: str = "qwen3", **changes: Any) -> Any:
    model = tiny_model(family, attn_implementation="sdpa", **changes)
    decode.install(model)
    return model


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, ids: Tensor, steps: int = 8, **options: Any) -> Any:
    config = options.pop("compile_config", None) or CompileConfig()
    config._compile_all_devices = True
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        compile_config=config,
        **({"cache_implementation": "static"} | options),
    )


def reason(model: Any) -> str:
    return model.get_compiled_call.reason


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "granite"])
def test_a_step_is_run_once_captured_and_replayed(family: str) -> None:
    model = model_of(family)
    ids = tokens()
    found = generate(model, ids)
    assert reason(model) == ""
    (graph,) = RunAgain.made
    assert graph.replays == 6  # the first token is the prompt's, the second the warm-up's
    assert torch.equal(found, generate(model, ids, disable_compile=True))
    assert model.config._attn_implementation == "sdpa"
    kept = getattr(model, "_cache", None) is not None  # by transformers 5.0, for the next time
    assert len(model.get_compiled_call._records) == kept


def test_every_generate_has_its_own_graph() -> None:
    model = model_of()
    for ids in (tokens(), tokens().flip(0), tokens(1), tokens(2, 3)):
        assert torch.equal(generate(model, ids), generate(model, ids, disable_compile=True))
        assert reason(model) == ""
    assert all(graph.replays >= 6 for graph in RunAgain.made)


def test_one_token_attention_is_used_in_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    one_token = attention.one_token
    monkeypatch.setattr(attention, "one_token", lambda *a: calls.append(1) or one_token(*a))
    model = model_of()
    ids = tokens()
    generate(model, ids, 2)
    assert len(calls) == 2  # layers of the warm-up; the fake graph's replays are not captured
    with torch.no_grad():
        model(ids)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "beside the logits"),
        ({"compile_config": CompileConfig(mode="max-autotune")}, "compile configuration"),
        ({"compile_config": CompileConfig(backend="eager")}, "compile configuration"),
    ],
)
def test_what_generate_is_asked_for(change: dict[str, Any], why: str) -> None:
    model = model_of()
    ids = tokens()
    found = generate(model, ids, **change)
    assert why in reason(model)
    found = found if isinstance(found, Tensor) else found.sequences
    assert torch.equal(found, generate(model, ids, disable_compile=True))
    assert not any(graph.replays for graph in RunAgain.made)
    generate(model, ids)
    assert reason(model) == "", "the next one is not affected"


def test_models_that_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(model: Any) -> str:
        found = model.get_compiled_call(None)
        assert found == model.__call__
        return reason(model)

    monkeypatch.setattr(step_checks, "check_device", DEVICE)
    assert why(model_of()) == "the model is on cpu"
    monkeypatch.setattr(step_checks, "check_device", lambda model: None)
    model = model_of()
    assert model.get_compiled_call(None) != model.__call__
    assert reason(model) == ""
    assert why(model.train()) == "the model is in training mode"
    model = model_of()
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert why(model) == "there are hooks in the model"
    handle.remove()
    assert model.get_compiled_call(None) != model.__call__
    monkeypatch.setenv("QUANTKIT_DECODE", "transformers")
    assert why(model) == "QUANTKIT_DECODE=transformers"
    monkeypatch.setenv("QUANTKIT_DECODE", "vllm")
    with pytest.raises(UsageError, match="vllm"):
        model.get_compiled_call(None)


DEVICE = step_checks.check_device


def test_hooks_of_transformers_that_only_collect() -> None:
    model = model_of()
    ids = tokens()
    with torch.no_grad():
        model(ids, output_hidden_states=True, output_attentions=False)
    generate(model, ids)
    assert reason(model) == ""


def test_a_cache_that_counts_in_python() -> None:
    model = model_of("mistral", sliding_window=8)
    ids = tokens(2, 5)
    for time in range(2):
        found = generate(model, ids, 10)
        assert reason(model) == "the cache counts in Python"
        assert torch.equal(found, generate(model, ids, 10, disable_compile=True))
        assert len(RunAgain.made) == 1, time


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunAgain, "fails", "CUDA error: not permitted\nmore")
    monkeypatch.setattr(decode.DecodingStep, "failed", "")
    model = model_of()
    ids = tokens()
    found = generate(model, ids)
    assert reason(model) == "no CUDA graph: CUDA error: not permitted"
    assert torch.equal(found, generate(model, ids, disable_compile=True))
    other = model_of()
    assert torch.equal(found, generate(other, ids))
    assert reason(other) == "no CUDA graph: CUDA error: not permitted"
    assert len(RunAgain.made) == 1


def step_of(model: Any, cache: Any, ids: Tensor, place: int, **more: Any) -> Any:
    """One step by hand, at most 12 tokens in all."""
    mask = (torch.arange(12) <= place)[None, None, None].expand(len(ids), 1, 1, 12)
    arguments = {
        "input_ids": ids,
        "position_ids": torch.full_like(ids, place),
        "attention_mask": mask,
        "use_cache": True,
        "return_dict": True,
    }
    with torch.no_grad():
        step = model.get_compiled_call(None)
        return step(past_key_values=cache, **(arguments | more))


def filled(model: Any, batch: int = 2) -> Any:
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(tokens(batch, 4), past_key_values=cache)
    return cache


def test_steps_by_hand() -> None:
    model = model_of()
    cache, other = filled(model), filled(model)
    for place in range(4, 9):
        ids = tokens(2, 12)[:, place : place + 1]
        found = step_of(model, cache, ids, place)
        assert reason(model) == ""
        assert found.past_key_values is cache
        with torch.no_grad():
            want = model(ids, past_key_values=other).logits
        assert (found.logits - want).norm() < 1e-5 * want.norm()
    (graph,) = RunAgain.made
    assert graph.replays == 4


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"input_ids": tokens(2, 2), "position_ids": tokens(2, 2)}, "not one token"),
        ({"something": object()}, "something is a object"),
        ({"something": [1]}, "something is a list"),
    ],
)
def test_arguments_of_other_kinds(more: dict[str, Any], why: str) -> None:
    model = model_of()
    cache = filled(model)
    step_of(model, cache, tokens(2, 1), 4, **({"attention_mask": None} | more))
    assert why in reason(model)
    assert not RunAgain.made


def test_caches_of_other_kinds() -> None:
    from transformers import DynamicCache

    model = model_of()
    step_of(model, DynamicCache(config=model.config), tokens(2, 1), 0, attention_mask=None)
    assert reason(model) == "the cache is a DynamicCache"
    step_of(model, StaticCache(config=model.config, max_cache_len=12), tokens(2, 1), 0)
    assert reason(model) == "the cache is empty"


def test_steps_that_never_repeat_are_left_alone() -> None:
    model = model_of()
    cache = filled(model)
    for place in range(4, 10):
        step_of(model, cache, tokens(2, 1), place, logits_to_keep=place)
        assert (reason(model) != "") == (place > 6)
    assert reason(model) == "no two steps of this cache are alike"
    assert len(RunAgain.made) == 3
    assert len(model.get_compiled_call._records) == 1


def test_a_changed_cache_gets_another_graph() -> None:
    model = model_of()
    cache = filled(model)
    for place in (4, 5):
        step_of(model, cache, tokens(2, 1), place)
    cache.layers[0].keys = cache.layers[0].keys.clone()
    for place in (6, 7):
        step_of(model, cache, tokens(2, 1), place)
    assert [graph.replays for graph in RunAgain.made] == [1, 1]
    cache.layers[1].something = 3
    step_of(model, cache, tokens(2, 1), 8)
    assert len(RunAgain.made) == 3
    assert reason(model) == ""


def test_changed_weights_drop_graphs() -> None:
    model = model_of()
    cache = filled(model)
    for place in (4, 5):
        step_of(model, cache, tokens(2, 1), place)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    step_of(model, cache, tokens(2, 1), 6)
    assert len(RunAgain.made) == 2


def test_graphs_are_few_and_die_with_their_caches() -> None:
    model = model_of()
    caches = [filled(model) for _ in range(decode.GRAPHS + 2)]
    for place in (4, 5):
        for cache in caches[:: -1 if place == 5 else 1]:
            step_of(model, cache, tokens(2, 1), place)
    records = model.get_compiled_call._records
    assert len(records) == decode.GRAPHS
    assert reason(model) == ""
    del cache
    while caches:
        caches.pop()
        gc.collect()
        assert len(records) <= len(caches)


def test_gradients_and_inference_mode() -> None:
    model = model_of()
    cache = filled(model)
    step = model.get_compiled_call(None)
    ids = tokens(2, 1)
    step(input_ids=ids, past_key_values=cache)
    assert reason(model) == "gradients are enabled"
    with torch.inference_mode():
        found = generate(model, tokens())
        assert reason(model) == ""
        assert torch.equal(found, generate(model, tokens(), disable_compile=True))


def test_copies_of_a_model_have_a_step_of_their_own() -> None:
    model = model_of()
    generate(model, tokens())
    twin = copy.deepcopy(model)
    assert twin.get_compiled_call is not model.get_compiled_call
    assert twin.get_compiled_call._model() is twin
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert generate(twin, tokens())[:, 6:].unique().numel() == 1
    assert pickle.loads(pickle.dumps(model_of())).get_compiled_call is not None


def test_the_step_makes_no_cycle_of_references() -> None:
    model = model_of()
    gone = weakref.ref(model)
    gc.disable()
    del model
    gc.enable()
    assert gone() is None


def test_loaded_packed_models_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from quantkit.checkpoint.step import Target
    from quantkit.pack.pack import pack
    from tests.tiny import calibrate_tiny

    monkeypatch.chdir(tmp_path)
    pack(calibrate_tiny(tmp_path), PackOptions("osc", mlp_out="mxfp4"), Target(tmp_path / "osc"))
    for model in (quantkit.load(tmp_path / "osc"), AutoModelForCausalLM.from_pretrained("osc")):
        assert isinstance(model.get_compiled_call, decode.DecodingStep)
        found = generate(model, tokens())
        assert reason(model) == ""
        monkeypatch.setattr(step_checks, "check_device", DEVICE)
        again = generate(model, tokens())
        assert reason(model) == "the model is on cpu"
        assert torch.equal(found, again)
        monkeypatch.setattr(step_checks, "check_device", lambda model: None)
    assert not isinstance(
        getattr(quantkit.load("model"), "get_compiled_call", None), decode.DecodingStep
    )
