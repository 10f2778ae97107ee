"""The inputs of every site, one block at a time: tokens to fit on, and tokens to judge on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.model.block import BlockRunner, Watcher
from quantkit.model.sites import Site

HELD = 0.2  # of the windows judge and never fit
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Observed:
    """What one site read: fit and held [tokens, width] in the runner's dtype, on its device."""

    site: Site
    fit: Tensor
    held: Tensor


def observe(
    runner: BlockRunner,
    ids: Tensor,
    wanted: Callable[[Site], bool],
    last_layer: int,
) -> Iterator[tuple[int, list[Observed]]]:
    """Run windows ids [n, seq] through the blocks up to `last_layer`; yield each block's inputs.

    Only sites that are `wanted` are kept; memory holds the hidden states of all windows and one
    block's inputs. The last fifth of the windows (at least one) is held out.
    """
    fitted = min(max(1, round(len(ids) * (1 - HELD))), max(len(ids) - 1, 1))
    size = max(BATCH_TOKENS[runner.device.type] // ids.shape[1], 1)
    parts = [("fit", b) for b in ids[:fitted].split(size)]
    parts += [("held", b) for b in ids[fitted:].split(size) if len(b)]
    hidden = [runner.embed(batch).cpu() for _, batch in parts]
    runner.prefetch(0)
    for layer in range(last_layer + 1):
        block = runner.load(layer)
        if layer < last_layer:
            runner.prefetch(layer + 1)
        sites = [site for site in runner.layout.layer_sites(layer) if wanted(site)]
        seen: dict[str, dict[str, list[Tensor]]] = {s.key: {"fit": [], "held": []} for s in sites}
        for i, (role, _) in enumerate(parts):
            keep = _keeper({key: roles[role] for key, roles in seen.items()})
            states = hidden[i].to(runner.device)
            hidden[i] = runner.capture(block, layer, states, keep).cpu()
        del block
        yield layer, [Observed(s, *_joined(seen.pop(s.key), s.width)) for s in sites]


def _keeper(seen: dict[str, list[Tensor]]) -> Watcher:
    def keep(site: Site, x: Tensor) -> None:
        if site.key in seen:
            seen[site.key].append(x.clone())

    return keep


def _joined(seen: dict[str, list[Tensor]], width: int) -> tuple[Tensor, Tensor]:
    fit, held = (
        torch.cat(parts) if parts else torch.empty(0, width)
        for parts in (seen["fit"], seen["held"])
    )
    return fit, held
