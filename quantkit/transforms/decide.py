"""Decide one site's smoothing scale: by rule, by search or by learning, never at a loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.store import Statistics
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats import FORMATS
from quantkit.model.sites import Linear, Site, read_weight
from quantkit.transforms.learned import Training, learn
from quantkit.transforms.observe import Observed
from quantkit.transforms.scales import (
    Problem,
    floored_quantile,
    quantiles_of,
    rule_scale,
    search,
    tail_quantile,
)
from quantkit.transforms.simulate import Simulation

METHODS = ("max", "quantile", "search", "learned")
ROWS = 16384  # of a mixture's readers that take part in an error; the maxima are over all of them
FEWEST = 64  # tokens to fit on, and half as many to judge on


@dataclass(frozen=True)
class Method:
    """How scales are found. `check` judges rules on held tokens and drops those that lose."""

    name: str = "quantile"
    alpha: float = 0.5
    quantile: float = 0.994
    check: bool = True
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Decision:
    """A site's scale [width] float32 (None: left alone) and what is known of it."""

    scale: Tensor | None
    before: float | None = None  # relative output error on the held tokens
    after: float | None = None
    how: str = ""
    alpha: float | None = None
    quantile: float | None = None
    steps: int = 0

    def record(self) -> dict[str, Any]:
        """Everything but the scale, for JSON."""
        data = asdict(self)
        del data["scale"]
        return {name: value for name, value in data.items() if value not in (None, "", 0)}


def decide(
    checkpoint: Checkpoint,
    site: Site,
    method: Method,
    simulation: Simulation,
    *,
    observed: Observed | None,
    statistics: Statistics | None,
) -> Decision:
    """Find the scale of one site.

    `max` and `quantile` take their magnitudes from the statistics where there are some, else from
    the observed tokens. With observed tokens every method's scale is compared with none on those
    held out, and none is chosen unless it loses: the site's error never grows.
    """
    tie = site.writer_rows() if site.groups > 1 else None
    block = max(_block(name) for name in (simulation.weights, simulation.activations))
    if block and site.width % block:
        return Decision(None, how=f"no blocks of {block}")
    enough = observed is not None and len(observed.fit) >= FEWEST <= 2 * len(observed.held)
    if not enough and (method.check or method.name in ("search", "learned")):
        return Decision(None, how="too few tokens")
    if method.name in ("max", "quantile"):
        magnitude = _magnitude(site, method, statistics, observed)
        if magnitude is None:
            return Decision(None, how="too few tokens")
        scale = rule_scale(magnitude.cpu(), _weight_max(checkpoint, site), method.alpha, tie)
        q = method.quantile if method.name == "quantile" else 1.0
        if observed is None or not method.check:
            return Decision(scale, how=method.name, alpha=method.alpha, quantile=q)
        problem = _problem(checkpoint, observed, simulation, tie)
        scale = scale.to(problem.w.device)
        before, after = problem.error(None), problem.error(scale)
        if not after < before:
            return Decision(None, before, before, "none")
        return Decision(scale.cpu(), before, after, method.name, method.alpha, q)
    assert observed is not None
    problem = _problem(checkpoint, observed, simulation, tie)
    found = search(problem)
    none, joint = found["none"], found["joint"]
    if method.name == "search":
        if not joint.error < none.error or joint.scale is None:
            return Decision(None, none.error, none.error, "none")
        best = joint.scale.cpu()
        return Decision(best, none.error, joint.error, "joint", joint.alpha, joint.quantile)
    starts = {"one": None, "joint": joint.scale}
    known = {"none": none.error, "joint": joint.error}
    learned = learn(problem, starts, method.training, known)
    kept = None if learned.scale is None else learned.scale.cpu()
    return Decision(kept, none.error, learned.error, learned.start, steps=learned.steps)


def _block(name: str) -> int:
    return FORMATS[name].block if name in FORMATS else 0  # int4 has one scale per row


def _magnitude(
    site: Site, method: Method, statistics: Statistics | None, observed: Observed | None
) -> Tensor | None:
    """A high quantile, or the largest, of |x| per channel."""
    key, q = site.key, method.quantile if method.name == "quantile" else 1.0
    if statistics is not None and statistics.has(key):
        absmax = statistics.get(key, "absmax").float()
        if q == 1:
            return absmax
        tail, count = statistics.get(key, "tail").float(), int(statistics.get(key, "count"))
        return floored_quantile(tail_quantile(tail.T, count, q), absmax)
    if observed is None:
        return None
    at_q, absmax = quantiles_of(observed.fit.float(), (q, 1.0))
    return absmax if q == 1 else floored_quantile(at_q, absmax)


def _weight_max(checkpoint: Checkpoint, site: Site) -> Tensor:
    """The largest |w| of every input channel over all linears that read the site: [width]."""
    largest = torch.zeros(site.width)
    for linear in site.linears:
        weight = read_weight(checkpoint, linear)
        largest = torch.maximum(largest, weight.abs().amax(0).float())
    return largest


def _problem(
    checkpoint: Checkpoint, observed: Observed, simulation: Simulation, tie: Tensor | None
) -> Problem:
    site, device = observed.site, observed.fit.device
    chosen = list(_spread(site.linears))
    weights = [read_weight(checkpoint, linear) for linear in chosen]
    w = torch.cat([weight.to(device).float() for weight in weights])
    largest = _weight_max(checkpoint, site) if len(chosen) < len(site.linears) else w.abs().amax(0)
    return Problem(
        observed.fit,
        observed.held,
        w,
        simulation,
        None if tie is None else tie.to(device),
        largest.to(device),
    )


def _spread(linears: tuple[Linear, ...]) -> Iterator[Linear]:
    """All linears, or of a mixture's readers evenly spread ones of at most ROWS rows."""
    rows = sum(linear.shape[0] for linear in linears)
    step = max(-(-rows // ROWS), 1)
    for i, linear in enumerate(linears):
        if (i // 2) % step == 0:  # gate and up of one expert stay together
            yield linear
