"""The decoding step of transformers' `generate` with a static cache, as one CUDA graph.

transformers compiles the step and runs it through torch.compile's own CUDA graphs; checking that
everything compiled still holds then takes the host about as long as a packed model takes the GPU.
Here the compiled step is captured once for each cache and replayed, after a check of what a replay
depends on: the form of the arguments, and the state of the cache. What is not understood goes the
way of transformers.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantkit.runtime.step_checks import (
    Left,
    check_cache,
    check_mode,
    check_model,
    form_of,
    same,
    state_of,
    tensors_of,
    weights_of,
)
from quantkit.runtime.step_graph import StepGraph, turns_of

if TYPE_CHECKING:
    from quantkit.runtime.step_inputs import Steps

GRAPHS = 8  # of a model: for the caches used last
MISSES = 2  # graphs of a cache in a row that fit no second step, before it is left alone
GIVEN = "input_ids", "position_ids", "attention_mask", "past_key_values"  # to a step


def install(model: Any) -> None:
    """Let `model.generate` take its decoding steps from here where it can (CUDA, static cache).

    They are transformers' compiled steps, but attention reads K and V once for a group of queries,
    which adds up in another order. `QUANTKIT_DECODE=transformers` in the environment, when
    `generate` starts, leaves them to transformers.
    """
    from quantkit.runtime.step_inputs import StepInputs

    model.get_compiled_call = DecodingStep(model)
    model.prepare_inputs_for_generation = StepInputs(model)


@dataclass
class Record:
    """What is known of a living cache: the form of its step, its state between steps, the graph."""

    form: tuple[object, ...]
    graph: StepGraph
    state: list[tuple[object, ...]]
    tensors: list[Tensor]  # of the state
    addresses: list[int]
    layers: Callable[[Any], tuple[Tensor, ...]] | None = None  # of a layer, its part of `tensors`
    misses: int = 0  # graphs before it in a row that were never replayed
    refused: str = ""

    def refuses(self, form: tuple[object, ...]) -> bool:
        """Whether this step is known not to be one to replay, or none of this cache is."""
        return self.refused != "" and (self.form == form or self.misses >= MISSES)

    def fits(self, form: tuple[object, ...], cache: Any) -> bool:
        """Whether a replay is this step on this cache."""
        return (
            self.form == form
            and same(self.state, state_of(cache))
            and self.addresses == [tensor.data_ptr() for tensor in self.tensors]
        )

    def holds(self, cache: Any) -> bool:
        """Whether a cache that fitted a step ago has its tensors still."""
        if self.layers is None:
            return same(self.state, state_of(cache))
        found = [*chain.from_iterable(map(self.layers, cache.layers))]
        return len(found) == len(self.tensors) and all(map(operator.is_, self.tensors, found))


class DecodingStep:
    """Takes the place of a model's `get_compiled_call`, which `generate` asks for its step.

    `reason` says why the last step, or the last `generate` that began, was left to transformers;
    it is empty when it was not. `failed` says why no step of this process is taken any more.
    """

    failed: ClassVar[str] = ""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # which holds this
        self.reason = ""
        self._records: OrderedDict[int, Record] = OrderedDict()  # by the identity of the cache
        self._lock = threading.RLock()
        self._compiled: dict[tuple[object, ...], Callable[..., Any]] = {}
        self._weights: tuple[object, ...] = ()
        self._stateful: set[type] = set()  # layers of caches that change in Python

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingStep:
        model = self._model()
        return DecodingStep(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), "get_compiled_call")  # of its class, where it is read

    def __call__(self, compile_config: Any = None) -> Callable[..., Any]:
        """The step for one `generate`, to be called with the model's keyword arguments."""
        model: Any = self._model()
        theirs = partial(type(model).get_compiled_call, model, compile_config)
        try:
            if DecodingStep.failed:
                raise Left(DecodingStep.failed)
            check_model(model)
            compiled = self._compile(model, compile_config)
        except Left as why:
            self.reason = str(why)
            return theirs()
        self.reason = ""
        inputs = model.__dict__.get("prepare_inputs_for_generation")
        if expect := getattr(inputs, "expect", None):
            expect(True)
        if self._weights != (weights := weights_of(model)):
            self._records.clear()
            self._weights = weights
        return partial(self._step, theirs, compiled, getattr(inputs, "steps", nothing))

    def _compile(self, model: Any, config: Any) -> Callable[..., Any]:
        """The model's forward compiled as `config` says but without CUDA graphs."""
        from transformers.generation.configuration_utils import CompileConfig

        config, usual = config or CompileConfig(), CompileConfig()
        if any(getattr(config, at) != getattr(usual, at) for at in ("backend", "mode", "options")):
            raise Left("the compile configuration is not the default")
        key = config.fullgraph, config.dynamic
        if key not in self._compiled:
            options: dict[str, Any] = {"triton.cudagraphs": False}
            self._compiled[key] = torch.compile(
                model.__call__, fullgraph=key[0], dynamic=key[1], options=options
            )
        return self._compiled[key]

    def _step(
        self,
        theirs: Callable[[], Any],
        compiled: Callable[..., Any],
        steps_of: Callable[[Any], Steps | None],
        **arguments: Any,
    ) -> Any:
        cache = arguments.get("past_key_values")
        steps = steps_of(cache)
        if steps is not None and (output := self._again(steps, cache, arguments)) is not None:
            return output
        try:
            output = self._own(compiled, arguments, steps)
        except Left as why:
            self.reason = str(why)
            if steps is not None:  # which gives parts of longer tensors
                arguments |= {
                    name: arguments[name].clone() for name in ("input_ids", "position_ids")
                }
            return theirs()(**arguments)
        self.reason = ""
        return output

    def _again(self, steps: Steps, cache: Any, arguments: dict[str, Any]) -> Any:
        """The output of a step that differs from the one before in token and position alone.

        None when that is not known. Within one `generate` the form of the arguments is that of
        the inputs prepared; the cache, which others can reach, is looked at.
        """
        if steps.known is None or not steps.gave(arguments):
            return None
        record: Record = steps.known[0]
        rest, inference = steps.known[1:]
        if (
            len(arguments) != len(rest) + len(GIVEN)
            or any(arguments.get(name, rest) is not value for name, value in rest.items())
            or torch.is_inference_mode_enabled() != inference
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cuda")
        ):
            return None
        with self._lock:
            if self._records.get(id(cache)) is not record or not record.holds(cache):
                return None
            return record.graph.replay(steps.given, cache)

    def _own(
        self, compiled: Callable[..., Any], arguments: dict[str, Any], steps: Steps | None
    ) -> Any:
        """The output of a step; Left when nothing was done."""
        from quantkit.runtime.attention import one_token_attention

        check_mode()
        if DecodingStep.failed:
            raise Left(DecodingStep.failed)
        given = {name: v for name, v in arguments.items() if name != "past_key_values"}
        cache = arguments.get("past_key_values")
        tensors, form = form_of(given)
        model: Any = self._model()
        with self._lock:
            record = self._records.get(id(cache))
            if record is not None and record.refuses(form):
                raise Left(record.refused)
            if record is None or not record.fits(form, cache):
                if {tensor.device for tensor in tensors} != {model.device}:
                    raise Left("the inputs are on another device")
                self._check_step(given, cache, record)
                with one_token_attention(model.config):
                    return self._first(compiled, given, tensors, form, cache)
            if not record.graph.captured:
                with one_token_attention(model.config):
                    capture(record, cache)
            record.misses = 0
            self._records.move_to_end(id(cache))
            output = record.graph.replay(tensors, cache)
            if steps is not None and steps.gave(arguments):
                kept = {name: v for name, v in given.items() if name not in GIVEN}
                steps.known = record, kept, torch.is_inference_mode_enabled()
            return output

    def _check_step(self, given: dict[str, Any], cache: Any, record: Record | None) -> None:
        """Left when a step that fits no graph should not get one."""
        check_cache(cache)
        if self._stateful.intersection(map(type, cache.layers)):
            raise Left("the cache counts in Python")
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape[1:] != (1,):
            raise Left("not one token a sequence")
        if record is not None and record.misses >= MISSES:
            record.refused = "no two steps of this cache are alike"
            raise Left(record.refused)

    def _first(
        self,
        compiled: Callable[..., Any],
        given: dict[str, Any],
        tensors: list[Tensor],
        form: tuple[object, ...],
        cache: Any,
    ) -> Any:
        """Do a step that no graph fits, and keep what the next one needs."""
        graph = StepGraph(turns_of(tensors[0].device), compiled, given)
        before, earlier = state_of(cache), self._records.pop(id(cache), None)
        output = graph.warm_up(tensors, cache)
        state = state_of(cache)
        held = [x for part in state for x in part if isinstance(x, Tensor)]
        places = [tensor.data_ptr() for tensor in held]
        record = Record(form, graph, state, held, places, tensors_of(cache.layers, held))
        if not same(before, state):
            record.refused = "the cache counts in Python"
            parts = zip(before[1:], state[1:], cache.layers, strict=True)
            self._stateful |= {type(part) for a, b, part in parts if not same([a], [b])}
        elif set(output) != {"logits", "past_key_values"} or output.past_key_values is not cache:
            record.refused = "there are outputs beside the logits"
        if earlier is None:
            weakref.finalize(cache, self._records.pop, id(cache), None).atexit = False
        else:
            record.misses = earlier.misses + 1
        self._records[id(cache)] = record
        while len(self._records) > GRAPHS:
            self._records.popitem(last=False)
        return output


def capture(record: Record, cache: Any) -> None:
    """Capture the record's graph, or leave every step of this process to transformers (Left).

    What a failed capture leaves behind in torch's allocator is not to be trusted with another.
    """
    try:
        record.graph.capture(cache)
    except RuntimeError as error:
        record.refused = f"no CUDA graph: {(str(error).splitlines() or [''])[0]}"
        DecodingStep.failed = record.refused
        raise Left(record.refused) from None


def nothing(cache: Any) -> None:
    """The steps whose inputs are prepared elsewhere."""
    return None
