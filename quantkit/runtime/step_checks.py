"""What a captured decoding step depends on: the model, torch's modes, the cache, its arguments.

`Left` says that a step is one for transformers.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.runtime.experts import QuantExperts
from quantkit.runtime.linear import QuantLinear

PASSIVE_HOOKS = "transformers.utils.output_capturing"  # what they collect shows in the output


class Left(Exception):
    """Why a step, or the steps of a whole `generate`, are left to transformers."""


def check_model(model: Any) -> None:
    """Left when the steps of this model, as it is now, are not to be replayed."""
    wanted = os.environ.get("QUANTKIT_DECODE", "quantkit")
    if wanted not in ("quantkit", "transformers"):
        raise UsageError(
            f"QUANTKIT_DECODE={wanted!r} names no decoding step",
            "set it to quantkit or transformers",
        )
    if wanted == "transformers":
        raise Left("QUANTKIT_DECODE=transformers")
    if model.training:
        raise Left("the model is in training mode")
    check_device(model)
    if "llama4" in model.config.model_type:
        raise Left("transformers does not compile this model")
    modules = list(model.modules())
    if any(isinstance(module, QuantExperts) for module in modules):
        raise Left("a mixture's tokens are sorted on the host")
    if any(map(hooked, modules)):
        raise Left("there are hooks in the model")


def check_device(model: nn.Module) -> None:
    """Left for models that are not on one CUDA device."""
    devices = {parameter.device for parameter in model.parameters()}
    parts = getattr(model, "hf_device_map", {})
    if len(devices) != 1 or len(set(parts.values())) > 1:
        raise Left("the model is on several devices")
    if (device := devices.pop()).type != "cuda":
        raise Left(f"the model is on {device.type}")


def hooked(module: nn.Module) -> bool:
    """Whether Python that a replay leaves out runs in the module's forward."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(getattr(hook, "__module__", "") != PASSIVE_HOOKS for hook in hooks)


def check_mode() -> None:
    """Left when torch is in a mode that a graph has not been made in."""
    if torch.is_grad_enabled():
        raise Left("gradients are enabled")
    if torch.is_autocast_enabled("cuda"):
        raise Left("autocast is enabled")


def check_cache(cache: Any) -> None:
    """Left for anything but a static cache that has a prompt in it."""
    from transformers import StaticCache

    if type(cache) is not StaticCache:
        raise Left(f"the cache is a {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise Left("the cache is offloaded")
    if not all(getattr(layer, "is_initialized", False) for layer in cache.layers):
        raise Left("the cache is empty")


def form_of(arguments: dict[str, Any]) -> tuple[list[Tensor], tuple[object, ...]]:
    """The tensors among the arguments, in order, and everything of them but the numbers.

    Left for arguments of unknown types.
    """
    tensors: list[Tensor] = []
    form: list[object] = [torch.is_inference_mode_enabled()]

    def look(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                look(f"{name}.{key}", part)
        elif type(value) is Tensor:
            tensors.append(value)
            form.append((name, value.shape, value.dtype, value.device))
        elif value is None or isinstance(value, (bool, int, float, str)):
            form.append((name, type(value), value))
        else:
            raise Left(f"{name} is a {type(value).__name__}")

    look("", arguments)
    return tensors, tuple(form)


def state_of(cache: Any) -> list[tuple[object, ...]]:
    """Everything the cache and its layers hold."""
    return [tuple(part.__dict__.values()) for part in (cache, *cache.layers)]


def tensors_of(layers: list[Any], held: list[Tensor]) -> Callable[[Any], tuple[Tensor, ...]] | None:
    """What gives the tensors of a layer, when all layers' are those held, by the same names."""
    names = [name for name, value in layers[0].__dict__.items() if isinstance(value, Tensor)]
    if len(names) < 2 or not all(layer.__dict__.keys() >= {*names} for layer in layers):
        return None
    get = operator.attrgetter(*names)
    found = [*chain.from_iterable(map(get, layers))]
    return get if len(found) == len(held) and all(map(operator.is_, found, held)) else None


def same(one: list[tuple[object, ...]], other: list[tuple[object, ...]]) -> bool:
    """Whether two states are made of the same objects (whose numbers, in tensors, may differ)."""
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in zip(one, other, strict=True)
    )


def weights_of(model: Any) -> tuple[object, ...]:
    """What a graph reads beside inputs and cache: it is made anew when this changes."""
    addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return tuple(addresses), tuple(module.site.prepared() for module in linears)
