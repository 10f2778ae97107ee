"""Choose the channels of every site: statistics (or activations) become a plan."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UsageError
from quantkit.model.sites import Site, read_weight
from quantkit.outliers import score
from quantkit.outliers.plan import Plan


def weight_energy(checkpoint: Checkpoint, site: Site) -> Tensor:
    """Sum of squares of the weights that meet each channel, over all linears: float64 [width].

    With inputs alike, what a channel's rounding error costs.
    """
    total = torch.zeros(site.width, dtype=torch.float64)
    for linear in site.linears:
        for part in read_weight(checkpoint, linear).split(4096):
            total += part.double().square().sum(0)
    return total


def choose(
    checkpoint: Checkpoint,
    sites: Iterable[Site],
    *,
    group: int = 32,
    criterion: str = "mode",
    errors: dict[str, Tensor] | None = None,
) -> Plan:
    """Take at most one channel of every group of each site, from the checkpoint's statistics.

    `criterion`: mode (OSC), magnitude (mean |x|), energy, or error, which needs `errors`: each
    site's `score.error_reduction`. An expert without statistics goes by its weights alone.
    Raises InputRejected without statistics or with stale ones.
    """
    from quantkit.calibrate.store import load_statistics

    if criterion not in score.CRITERIA:
        raise UsageError(f"criterion {criterion!r}: one of {', '.join(score.CRITERIA)}")
    statistics = load_statistics(checkpoint)
    chosen: dict[str, tuple[int, ...]] = {}
    density: dict[str, float] = {}
    for site in sites:
        if not statistics.has(site.key):  # an expert that saw too few tokens to tell
            by_weight = score.best_of_groups(weight_energy(checkpoint, site), group)
            chosen[site.key] = tuple(by_weight.tolist())
            continue
        if criterion == "mode":
            channels = score.mode_of_argmax(statistics.get(site.key, f"hits{group}"), group)
        elif criterion == "error":
            assert errors is not None
            channels = score.best_of_groups(errors[site.key], group)
        else:
            name = {"magnitude": "abs_mean", "energy": "energy"}[criterion]
            channels = score.best_of_groups(statistics.get(site.key, name), group)
        chosen[site.key] = tuple(channels.tolist())
        of_groups = statistics.density(site.key, group)
        if not bool(of_groups.isnan().all()):
            density[site.key] = round(float(of_groups.nanmean()), 6)
    digest = checkpoint.weights_digest()
    return Plan(chosen, group, criterion, digest, statistics.digest, density)
