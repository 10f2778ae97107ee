"""What folding costs, on text: the loss before and after, and the inputs' ranges NVFP4 needs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit import console
from quantkit.data.tokens import TokenBatch
from quantkit.evaluate.perplexity import Excess, compare, negative_log_likelihood
from quantkit.formats import nvfp4
from quantkit.pack.rtn import power_of_two_below


def excess_loss(before: Path, after: Path, tokens: TokenBatch) -> Excess:
    """The loss that checkpoint `after` has over `before`, one model in memory at a time."""
    from quantkit.runtime.load import load

    losses = []
    for path in (before, after):
        with console.progress(f"loss of {path.name}", len(tokens.ids)) as progress:
            losses.append(negative_log_likelihood(load(path), tokens.ids, progress=progress))
        gc.collect()
    return compare(*losses)


def input_scales(path: Path, hadamards: Mapping[str, int], tokens: TokenBatch) -> dict[str, Tensor]:
    """NVFP4 input global scales, float32 [1] by linear, of everything it reads on this text.

    `hadamards`: the linears and the size of the online Hadamard their inputs meet (0: none). A
    linear that read nothing (an expert without tokens) is left out.
    """
    from quantkit.runtime.convert import name_in_memory
    from quantkit.runtime.load import load
    from quantkit.transforms.hadamard import rotate

    model = load(path)
    largest: dict[str, Tensor] = {}

    def watch(name: str, size: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if x.numel():
                met = (rotate(x, size) if size else x).abs().amax().float().cpu()
                largest[name] = torch.maximum(largest.get(name, met), met)

        return hook

    for name, size in hadamards.items():
        module = model.get_submodule(name_in_memory(model.config.model_type, name))
        module.register_forward_pre_hook(watch(name, size))
    with console.progress("ranges of the inputs", len(tokens.ids)) as progress:
        negative_log_likelihood(model, tokens.ids, progress=progress)
    return {name: power_of_two_below(nvfp4.global_scale(met)) for name, met in largest.items()}
