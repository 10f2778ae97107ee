"""What `generate` gives a decoding step: the mask of a step is made in the step, not before it.

transformers prepares a step's inputs while the GPU waits: with a static cache it makes the mask of
each step anew from the padding and the cache's length, in a dozen small operations. A model's
forward does the same from the padding alone when it is given that, so inside a graph. The padding
of all places the cache has, where those to come count as seen (causality hides them), is the same
in every step; what changes is the last token and its position.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer

CHANGING = ("input_ids", "position_ids")  # of a step's inputs, first and in this order
PLAIN = (bool, int, float, str, type(None))


@dataclass
class Steps:
    """The steps of one `generate` on one cache."""

    cache: weakref.ref[Any]
    names: frozenset[str] = frozenset()  # of what `generate` prepares inputs from
    sequences: int = 0
    seen: int = 0  # tokens that have been, which `generate` extends the mask and positions by
    unpadded: bool = False  # `generate` has no mask
    padding: Tensor | None = None  # bool [sequences, places of the cache], true: seen
    rest: dict[str, Any] = field(default_factory=dict)  # of a step's inputs: the same in every one
    given: tuple[Tensor, ...] = ()  # of the step last prepared, those that change
    known: Any = None  # what the step keeps here: this one does not look at it

    def follows(self, input_ids: Any, sources: dict[str, Any]) -> bool:
        """Whether these are the sources of the next step, as far as they can change."""
        mask, shape = sources.get("attention_mask"), (self.sequences, self.seen + 1)
        return (
            sources.keys() == self.names
            and sources["next_sequence_length"] == 1
            and input_ids.dim() == 2
            and input_ids.shape[0] == self.sequences
            and (mask is None) == self.unpadded
            and (mask is None or mask.shape == shape)
            and sources["position_ids"].shape == shape
        )

    def inputs(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """The inputs of a step, whose token and position are the last."""
        self.given = input_ids[:, -1:], position_ids[:, -1:]
        changing = dict(zip(CHANGING, self.given, strict=True))
        return (
            changing | {"attention_mask": self.padding, "past_key_values": self.cache()} | self.rest
        )

    def gave(self, arguments: dict[str, Any]) -> bool:
        """Whether a step's arguments, beside the cache, are those last prepared here."""
        return (
            len(self.given) == 2
            and arguments.get("input_ids") is self.given[0]
            and arguments.get("position_ids") is self.given[1]
            and arguments.get("attention_mask") is self.padding
        )


class StepInputs:
    """Takes the place of a model's `prepare_inputs_for_generation`.

    `expect` says that the `generate` which begins in this thread takes its steps from quantkit;
    every other one, and what is not understood, is prepared by the model's class.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # which holds this
        self._steps: dict[int, Steps] = {}  # by the identity of the cache
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepInputs:
        model = self._model()
        return StepInputs(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), "prepare_inputs_for_generation")

    @property
    def __signature__(self) -> inspect.Signature:
        """transformers looks for the model's arguments in it."""
        return inspect.signature(self._theirs())

    def _theirs(self) -> Any:
        model: Any = self._model()
        return type(model).prepare_inputs_for_generation.__get__(model)

    def expect(self, ours: bool) -> None:
        """Whether the `generate` that begins takes quantkit's steps."""
        self._thread.ours = ours

    def steps(self, cache: Any) -> Steps | None:
        """Those of the `generate` that runs on a cache, when their inputs come from here."""
        steps = self._steps.get(id(cache))
        return steps if steps is not None and steps.cache() is cache else None

    def __call__(self, *args: Any, **sources: Any) -> Any:
        cache = sources.get("past_key_values")
        if sources.get("is_first_iteration"):
            self._begin(cache)
            return self._theirs()(*args, **sources)
        steps = self.steps(cache)
        if steps is None or len(args) != 1:
            return self._theirs()(*args, **sources)
        if steps.padding is None:
            inputs = self._theirs()(*args, **sources)
            if not learn(steps, self._model(), args[0], sources, inputs):
                self._steps.pop(id(cache), None)
                return inputs
        elif not steps.follows(args[0], sources):
            self._steps.pop(id(cache), None)
            return self._theirs()(*args, **sources)
        steps.seen = sources["position_ids"].shape[1]
        return steps.inputs(args[0], sources["position_ids"])

    def _begin(self, cache: Any) -> None:
        ours, self._thread.ours = getattr(self._thread, "ours", False), False
        key, kept = id(cache), self._steps
        kept.pop(key, None)
        if ours and whole(cache) and usual(self._model()):
            kept[key] = Steps(weakref.ref(cache, lambda _: kept.pop(key, None)))


def whole(cache: Any) -> bool:
    """Whether a cache has a place for every token in all its layers: none slides."""
    return type(cache) is StaticCache and {type(layer) for layer in cache.layers} == {StaticLayer}


def usual(model: Any) -> bool:
    """Whether nothing of the model's own decides about masks and inputs."""
    text = model.config.get_text_config(decoder=True)
    methods = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    return (
        all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in methods)
        and methods[1] not in model.__dict__
        and not hasattr(model, "create_masks_for_generate")
        and not model.config.is_encoder_decoder
        and text._attn_implementation == "sdpa"
        and not getattr(model, "is_remote_code", bool)()
    )


def learn(
    steps: Steps, model: Any, input_ids: Any, sources: dict[str, Any], inputs: dict[str, Any]
) -> bool:
    """Take over from transformers, whose inputs of a first step these are; false when unusual."""
    padding: Any = sources.get("attention_mask")
    positions: Any = sources.get("position_ids")
    tensors = [input_ids, positions] + ([] if padding is None else [padding])
    if sources.get("next_sequence_length") != 1 or not all(type(t) is Tensor for t in tensors):
        return False
    rows, seen = input_ids.shape[0], positions.shape[-1]
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict) and mask.keys() == {"full_attention"}:
        mask = mask["full_attention"]
    if not isinstance(mask, Tensor):
        return False
    places = sources["past_key_values"].layers[0].max_cache_len
    names = {*CHANGING, "attention_mask", "past_key_values"}
    rest = {name: value for name, value in inputs.items() if name not in names}
    if (
        input_ids.dim() != 2
        or {tensor.device for tensor in tensors} != {model.device}
        or (padding is not None and padding.shape != (rows, seen))
        or positions.shape != (rows, seen)
        or places < seen
        or mask.dtype != torch.bool
        or mask.shape != (rows, 1, 1, places)
        or inputs.get("past_key_values") is not sources["past_key_values"]
        or any(inputs.get(name) is None or inputs[name].shape != (rows, 1) for name in CHANGING)
        or not all(isinstance(value, PLAIN) for value in rest.values())
    ):
        return False
    steps.names, steps.sequences, steps.rest = frozenset(sources), rows, rest
    steps.padding = torch.ones(rows, places, dtype=torch.bool, device=model.device)
    steps.unpadded = padding is None
    if padding is not None:
        steps.padding[:, :seen] = padding
    return True
