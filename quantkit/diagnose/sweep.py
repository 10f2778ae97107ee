"""Many arrangements of one model in one pass over its blocks.

An arrangement says for every layer and site how it computes. Two arrangements that agree on all
layers up to the present one have the same hidden states there, so they are carried once and part
company where they first differ: leaving out layer 20 costs the layers from 20 on, not the model.
Each block is read and rounded once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import console
from quantkit.diagnose.switches import PLAIN, Rounder, SiteSwitch, install
from quantkit.evaluate.perplexity import token_losses
from quantkit.model.block import BlockRunner
from quantkit.model.sites import ModelLayout, Site

Arrangement = Callable[[Site], Hashable]
"""Mode of a site (see switches.py); pure, so that equal arrangements can be shared."""

Observer = Callable[[int, dict[str, SiteSwitch], object, list[Tensor]], None]
"""Called at every layer: (layer, switches, block, plain hidden states going in)."""


@dataclass(frozen=True)
class Swept:
    """Losses [windows, seq - 1] by name of the arrangement, and the drift of hidden states.

    `drift[name][layer]`: relative error of the hidden states leaving a layer, against those of
    the plain model: ||h - h0|| / ||h0||.
    """

    losses: dict[str, Tensor]
    drift: dict[str, list[float]]
    blocks_run: int  # block forward passes over all windows


def sweep(
    runner: BlockRunner,
    tokens: Tensor,
    arrangements: Mapping[str, Arrangement],
    round_site: Rounder,
    *,
    batch: int = 1,
    spreads: Mapping[str, Tensor] | None = None,
    observe: Observer | None = None,
    drift_of: Sequence[str] = (),
    label: str = "diagnosis",
) -> Swept:
    """Run every arrangement over the windows of `tokens` [n, seq] and take its losses.

    Args:
        batch: windows per forward pass.
        spreads: standard deviations by site key, for noise modes.
        observe: looks at each layer before it runs; needs an arrangement that is plain so far.
        drift_of: arrangements whose drift from the plain one is wanted (one of the arrangements
            must be plain everywhere).
    """
    layout = runner.layout
    windows = [tokens[i : i + batch].to(runner.device) for i in range(0, len(tokens), batch)]
    paths = histories(layout, arrangements)
    total = sum(len(set(at.values())) for at in paths)
    with torch.no_grad(), console.progress(label, total) as progress:
        states = {PLAIN_SO_FAR: [runner.embed(window) for window in windows]}
        before = dict.fromkeys(arrangements, PLAIN_SO_FAR)
        drift: dict[str, list[float]] = {name: [] for name in drift_of}
        for layer, after in enumerate(paths):
            block = runner.load(layer)
            if layer + 1 < layout.n_layers:
                runner.prefetch(layer + 1)
            switches = install(block, layout, layer, round_site, spreads or {})
            if observe is not None:
                observe(layer, switches, block, states[PLAIN_SO_FAR])
            reached: dict[int, list[Tensor]] = {}
            for name, arrangement in arrangements.items():
                if after[name] in reached:
                    continue
                for switch in switches.values():
                    switch.set(arrangement(switch.site))
                inputs = states[before[name]]
                reached[after[name]] = [runner.forward(block, h) for h in inputs]
                progress.advance(1, f"layer {layer + 1} of {layout.n_layers}")
            states, before = reached, after
            for name in drift_of:
                drift[name].append(relative_error(states[after[name]], states[PLAIN_SO_FAR]))
        losses = {key: _losses(runner, windows, state) for key, state in states.items()}
    return Swept({name: losses[key] for name, key in before.items()}, drift, total)


PLAIN_SO_FAR = 0


def histories(layout: ModelLayout, arrangements: Mapping[str, Arrangement]) -> list[dict[str, int]]:
    """Which hidden states each arrangement has after each layer: equal numbers, equal states.

    Number 0 is what the plain model has.
    """
    now = dict.fromkeys(arrangements, PLAIN_SO_FAR)
    found = []
    for layer in range(layout.n_layers):
        sites = layout.layer_sites(layer)
        known: dict[tuple[int, tuple[Hashable, ...]], int] = {}
        for name, arrangement in arrangements.items():
            pattern = tuple(arrangement(site) for site in sites)
            if now[name] == PLAIN_SO_FAR and all(mode is PLAIN for mode in pattern):
                continue
            now[name] = known.setdefault((now[name], pattern), len(known) + 1)
        found.append(dict(now))
    return found


def relative_error(states: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """||h - h0|| / ||h0|| over all windows."""
    pairs = list(zip(states, exact, strict=True))
    wrong = sum(float((h.float() - h0.float()).square().sum()) for h, h0 in pairs)
    whole = sum(float(h0.float().square().sum()) for _, h0 in pairs)
    return (wrong / whole) ** 0.5 if whole else 0.0


def _losses(runner: BlockRunner, windows: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    parts = []
    for window, hidden in zip(windows, states, strict=True):
        logits = runner.head(hidden)[:, :-1]
        parts.append(token_losses(logits, window[:, 1:].long()).cpu())
    return torch.cat(parts)
