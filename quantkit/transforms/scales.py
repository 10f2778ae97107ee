"""Smoothing scales by rule: maxima, quantiles, and the joint search over both exponents.

`x / s` meets `w * s`: a scale above one takes range from the activation and gives it to the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.transforms.simulate import Simulation, output_error

LIMIT = 6.0  # |log s|, after centring
ALPHAS = tuple(0.25 + 0.025 * i for i in range(21))
# 15 quantiles whose distance from 1 is log-spaced, and 1 itself.
QUANTILES = (*(1 - 0.05 * (0.002 ** (i / 14)) for i in range(15)), 1.0)
SEARCHING = 1024  # held tokens that rank the grid
ROWS = 512  # outputs that take part in an estimate
SEPARATING = 2048  # tokens that decide which channels a plan would take
BEST = 5  # alphas and quantiles that meet in the joint search
FINALISTS = 3  # of the joint search, judged on all held tokens and outputs


def smoothing_scale(magnitude: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """s = magnitude^alpha / weight_max^(1 - alpha), centred to geometric mean 1 and clamped.

    magnitude [width]: a high quantile, or the largest, of |x| per channel; weight_max [width]: the
    largest |w| per channel over every consumer. Channels that are zero on either side get the
    neutral scale. A common factor of all s is no freedom to lose: dynamic scales absorb it.
    SmoothQuant (2211.10438, equation 4); with quantiles 2606.09927.
    """
    live = (magnitude > 0) & (weight_max > 0)
    log_s = alpha * magnitude.double().clamp_min(1e-30).log()
    log_s = log_s - (1 - alpha) * weight_max.double().clamp_min(1e-30).log()
    return centred(torch.where(live, log_s, torch.nan)).exp().to(torch.float32)


def centred(log_s: Tensor) -> Tensor:
    """Subtract the mean of the finite logarithms, put 0 where there is none, clamp to +-LIMIT."""
    return (log_s - log_s.nanmean()).nan_to_num(0.0).clamp(-LIMIT, LIMIT)


def tail_quantile(tail: Tensor, count: int, q: float) -> Tensor:
    """The exact q-quantile of |x| per channel from its largest values: [width].

    tail [k, width] holds the k largest |x| of each channel, in any order; count is the number of
    tokens. Interpolates linearly between order statistics, as `torch.quantile`. Raises UsageError
    when the tail does not reach down to q.
    """
    if not 0 < q <= 1:
        raise UsageError(f"--quantile must lie in (0, 1], not {q}")
    position = q * (count - 1)
    rank = count - 1 - math.floor(position)  # from the top: 0 is the maximum
    if rank >= tail.shape[0] and tail.shape[0] < count:
        lowest = 1 - (tail.shape[0] - 1) / max(count - 1, 1)
        raise UsageError(
            f"the quantile {q} of {count} tokens needs the {rank + 1} largest values per channel, "
            f"the statistics hold {tail.shape[0]}",
            f"use --quantile {math.ceil(lowest * 1e4) / 1e4} or more",
        )
    return _between(tail.sort(0, descending=True).values, count, q)


def _between(ordered: Tensor, count: int, q: float) -> Tensor:
    """The q-quantile from the largest values in descending order."""
    position = q * (count - 1)
    rank = count - 1 - math.floor(position)
    low, high = ordered[rank].double(), ordered[max(rank - 1, 0)].double()
    return (low + (position - math.floor(position)) * (high - low)).to(ordered.dtype)


def floored_quantile(quantile: Tensor, absmax: Tensor) -> Tensor:
    """Raise quantiles that vanish next to the maximum: rarely active is not dead."""
    return torch.maximum(quantile, absmax / 64)


def quantiles_of(x: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """Exact quantiles of |x| per channel: [len(quantiles), width] for x [tokens, width]."""
    keep = min(len(x), math.ceil((1 - min(quantiles)) * len(x)) + 2)
    tails = [part.T.contiguous().abs().topk(keep, 1).values.T for part in x.split(512, 1)]
    ordered = torch.cat(tails, 1).float()
    return torch.stack([_between(ordered, len(x), q) for q in quantiles])


@dataclass(frozen=True)
class Problem:
    """One linear input: tokens to fit on and to judge on, the weights it meets, their rounding.

    x [tokens, width], held [tokens, width], w [out, width] (consumers stacked); `tie` [width] int64
    numbers the channels that must share one scale (heads that read one KV head); `weight_max`
    [width] is the largest |w| over all consumers, where w does not hold them all.
    """

    x: Tensor
    held: Tensor
    w: Tensor
    simulation: Simulation
    tie: Tensor | None = None
    weight_max: Tensor | None = None

    def error(self, scale: Tensor | None, tokens: int | None = None) -> float:
        """Relative output error with `scale` on the held tokens.

        With `tokens`, an estimate for ranking: on the first so many and at most ROWS outputs.
        """
        held, w = self.held[:tokens], self.w
        if tokens is not None and len(w) > ROWS:
            w = w[torch.arange(ROWS, device=w.device) * len(w) // ROWS]
        return output_error(held, w, self.simulation, scale, self.kept(scale))[1]

    def kept(self, scale: Tensor | None) -> Tensor | None:
        """The channels a plan made on the smoothed tokens leaves in the rounding; None: all."""
        if self.simulation.group is None:
            return None
        fitted = self.x[:SEPARATING].float()
        return self.simulation.kept(fitted if scale is None else fitted / scale)

    def rule(self, magnitude: Tensor, alpha: float) -> Tensor:
        """`smoothing_scale` of this site; tied channels use their largest magnitudes."""
        largest = self.w.abs().amax(0) if self.weight_max is None else self.weight_max
        return rule_scale(magnitude, largest.float(), alpha, self.tie)


def rule_scale(magnitude: Tensor, weight_max: Tensor, alpha: float, tie: Tensor | None) -> Tensor:
    """`smoothing_scale` with both statistics raised to the maximum over tied channels."""
    if tie is not None:
        magnitude, weight_max = _shared(magnitude, tie), _shared(weight_max, tie)
    return smoothing_scale(magnitude, weight_max, alpha)


def _shared(values: Tensor, tie: Tensor) -> Tensor:
    groups = values.new_zeros(int(tie.max()) + 1)
    return groups.scatter_reduce(0, tie, values, "amax")[tie]


@dataclass(frozen=True)
class Candidate:
    """A scale (None: leave the site alone) and the relative output error it leaves."""

    scale: Tensor | None
    error: float
    alpha: float | None = None
    quantile: float | None = None


def search(
    problem: Problem,
    alphas: tuple[float, ...] = ALPHAS,
    quantiles: tuple[float, ...] = QUANTILES,
) -> dict[str, Candidate]:
    """The best scales by rule: `alpha` (q = 1), `quantile` (alpha = 0.5), `joint`, and `none`.

    `joint` pairs the BEST alphas with the BEST quantiles, ranks them by an estimate and takes the
    best finalist on all held tokens. It also holds the winners of `alpha` and `quantile`, so that
    it is never worse than they are on the tokens that choose it.
    2606.09927, steps N1 to N3.
    """
    table = dict(zip(quantiles, quantiles_of(problem.x, quantiles), strict=True))
    top = quantiles_of(problem.x, (1.0,))[0]

    def attempt(alpha: float, q: float) -> Candidate:
        magnitude = top if q == 1 else floored_quantile(table[q], top)
        scale = problem.rule(magnitude, alpha)
        return Candidate(scale, problem.error(scale, SEARCHING), alpha, q)

    by_alpha = sorted((attempt(alpha, 1.0) for alpha in alphas), key=lambda c: c.error)
    by_quantile = sorted((attempt(0.5, q) for q in quantiles), key=lambda c: c.error)
    best_alphas = {c.alpha for c in by_alpha[:BEST]}
    best_quantiles = {c.quantile for c in by_quantile[:BEST]} | {1.0}
    joint = [attempt(a, q) for a in best_alphas for q in best_quantiles if a and q]

    def judged(candidate: Candidate) -> Candidate:
        return replace(candidate, error=problem.error(candidate.scale))

    finalists = sorted(joint, key=lambda c: c.error)[:FINALISTS]
    found = {"none": judged(Candidate(None, 0.0))}
    found |= {"alpha": judged(by_alpha[0]), "quantile": judged(by_quantile[0])}
    rivals = [found["alpha"], found["quantile"], *map(judged, finalists)]
    found["joint"] = min(rivals, key=lambda c: c.error)
    return found
