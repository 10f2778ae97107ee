"""Smoothing scales by gradient: s = exp(theta), through rounding and through the scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.transforms.scales import Problem, centred
from quantkit.transforms.simulate import straight_through

TILE = {"cpu": 1 << 18}  # elements worked on at a time: what the cache holds; else a whole batch
LEAST_GAIN = 5e-4  # relative; smaller improvements of the held error do not count


@dataclass(frozen=True)
class Training:
    """How scales are learned (2606.09927: 800 steps of 0.02, warm-up 5, patience 80)."""

    steps: int = 800
    learning_rate: float = 0.02
    warmup: int = 5
    patience: int = 80
    check_every: int = 20
    trial: int = 60  # steps that choose among several starts
    batch: int = 512  # tokens a step, drawn anew
    outputs: int = 512  # output channels a step, drawn anew
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """The scale with the least error on the held tokens, and where it came from."""

    scale: Tensor | None  # None: doing nothing is best
    error: float
    start: str
    errors: dict[str, float]  # held error of every start before and ("+learned") after training
    steps: int


def learn(
    problem: Problem,
    starts: dict[str, Tensor | None],
    training: Training,
    known: Mapping[str, float] | None = None,
) -> Learned:
    """Train from the start that does best in a short trial; keep the best scale ever met.

    `starts` by name (None means s = 1); `known` are held errors of starts, and of `none`, that were
    computed before. The starts, what the trials made of them, and s = 1 all
    stay candidates: on the held tokens the result is never worse than doing nothing.
    """
    candidates: dict[str, Tensor | None] = {"none": None, **starts}
    errors = dict(known or {})
    for name, scale in candidates.items():
        if name not in errors:
            same = name != "none" and scale is None
            errors[name] = errors["none"] if same else problem.error(scale)

    def attempt(name: str, start: Tensor | None, plan: Training) -> int:
        candidates[name], steps = descend(problem, start, plan)
        errors[name] = problem.error(candidates[name])
        return steps

    trial = replace(training, steps=min(training.trial, training.steps))
    taken, names = 0, list(starts)
    if len(starts) > 1:
        for name in names:
            taken += attempt(f"{name}+trial", starts[name], trial)
        names.sort(key=lambda name: errors[f"{name}+trial"])
    taken += attempt(f"{names[0]}+learned", starts[names[0]], training)
    best = min(errors, key=lambda name: errors[name])
    return Learned(candidates[best], errors[best], best, errors, taken)


def descend(problem: Problem, start: Tensor | None, training: Training) -> tuple[Tensor, int]:
    """One run of AdamW with a cosine schedule; returns the best scale seen and the steps taken.

    The loss is the squared output error of a batch of the fitted tokens at random outputs; the held
    tokens decide which step is kept and when to stop. theta is centred and clamped at every step.
    """
    x, w, tie = problem.x.bfloat16(), problem.w.bfloat16(), problem.tie
    generator = torch.Generator().manual_seed(training.seed)
    initial = torch.zeros(x.shape[1], device=x.device) if start is None else start.log().float()
    theta = _fold(initial, tie).clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=training.learning_rate, weight_decay=0.0)

    best_theta, best_error, best_step = theta.detach().clone(), math.inf, 0
    for step in range(training.steps + 1):
        if step % training.check_every == 0 or step == training.steps:
            scale = _unfold(theta.detach(), tie).exp()
            error = problem.error(scale, tokens=4 * training.batch)
            kept = problem.kept(scale)
            if error < (1 - LEAST_GAIN) * best_error:
                best_theta, best_error, best_step = theta.detach().clone(), error, step
            if step - best_step >= training.patience or step == training.steps:
                break
        if step % training.check_every == 0:
            rows, outputs = _drawn(problem, training, generator)
        now = step % training.check_every
        optimizer.param_groups[0]["lr"] = training.learning_rate * _schedule(step, training)
        optimizer.zero_grad(set_to_none=True)
        _accumulate(x[rows[now]], w[outputs[now]], theta, problem, kept)
        optimizer.step()
        with torch.no_grad():
            theta.copy_(centred(theta))
    return _unfold(best_theta, tie).exp(), step


def _drawn(
    problem: Problem, training: Training, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens and outputs of the steps up to the next check, [steps, n] each.

    Drawn on the CPU, the same on every device; copied at once, as each copy waits for the device.
    """
    x, w, steps = problem.x, problem.w, range(training.check_every)
    batch = (min(training.batch, len(x)),)
    rows = [torch.randint(len(x), batch, generator=generator) for _ in steps]
    outputs = [torch.randperm(len(w), generator=generator)[: training.outputs] for _ in steps]
    return torch.stack(rows).to(x.device), torch.stack(outputs).to(w.device)


def _accumulate(x: Tensor, w: Tensor, theta: Tensor, problem: Problem, kept: Tensor | None) -> None:
    """Add the gradient of the squared error over tokens x to theta's, a tile of them at a time."""
    # NOTE: all of this runs in bfloat16, whose rounding (2^-9) is small next to that of four bits
    # and only perturbs the gradient; the errors that choose a scale are computed in float32.
    sim, log_s = problem.simulation, _unfold(theta, problem.tie)
    rest = w if kept is None else w * kept.to(w.dtype)  # the branch is exact: no part of the error
    w_hat = straight_through(sim.transform(rest * log_s.exp().to(w.dtype)), sim.weights, sim.rule)
    leaf = w_hat.detach().requires_grad_()
    inverse = (-log_s).exp() if kept is None else (-log_s).exp() * kept
    shrink = inverse.detach().requires_grad_()
    for part in x.split(max(TILE.get(x.device.type, len(x) * w.shape[1]) // w.shape[1], 32)):
        smoothed = sim.transform(part * shrink.to(part.dtype))
        x_hat = straight_through(smoothed, sim.activations, sim.rule)
        (x_hat @ leaf.T - part @ rest.T).float().square().sum().backward()
    torch.autograd.backward([w_hat, inverse], [leaf.grad, shrink.grad])


def _schedule(step: int, training: Training) -> float:
    if step < training.warmup:
        return (step + 1) / training.warmup
    done = (step - training.warmup) / max(training.steps - training.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def _fold(log_s: Tensor, tie: Tensor | None) -> Tensor:
    """One parameter per tied group."""
    if tie is None:
        return log_s
    groups = log_s.new_zeros(int(tie.max()) + 1)
    return groups.scatter_reduce(0, tie, log_s, "mean", include_self=False)


def _unfold(theta: Tensor, tie: Tensor | None) -> Tensor:
    return theta if tie is None else theta[tie]
