"""Smoothing scales by gradient: s = exp(theta), through rounding and through the scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.transforms.scales import Problem, centred
from quantkit.transforms.simulate import straight_through


@dataclass(frozen=True)
class Training:
    """How scales are learned (2606.09927: 800 steps of 0.02, warm-up 5, patience 80)."""

    steps: int = 800
    learning_rate: float = 0.02
    warmup: int = 5
    patience: int = 80
    check_every: int = 20
    batch: int = 1024  # tokens a step
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """The scale with the least error on the held tokens, and where it came from."""

    scale: Tensor | None  # None: doing nothing is best
    error: float
    start: str
    errors: dict[str, float]  # held error of every start before and ("+learned") after training
    steps: int


def learn(problem: Problem, starts: dict[str, Tensor | None], training: Training) -> Learned:
    """Train from every start (None means s = 1) and keep the best scale on the held tokens.

    The starts themselves stay candidates, and s = 1 always is one: the result is never worse than
    doing nothing on the held tokens.
    """
    candidates: dict[str, Tensor | None] = {"none": None, **starts}
    errors = {name: problem.error(scale) for name, scale in candidates.items()}
    taken = 0
    for name, start in starts.items():
        scale, steps = descend(problem, start, training)
        taken += steps
        candidates[f"{name}+learned"] = scale
        errors[f"{name}+learned"] = problem.error(scale)
    best = min(errors, key=lambda name: errors[name])
    return Learned(candidates[best], errors[best], best, errors, taken)


def descend(problem: Problem, start: Tensor | None, training: Training) -> tuple[Tensor, int]:
    """One run of AdamW with a cosine schedule; returns the best scale seen and the steps taken.

    The loss is the relative output error of a batch of the fitted tokens; the held tokens decide
    which step is kept and when to stop. theta is centred and clamped after every step.
    """
    x, w, tie = problem.x, problem.w, problem.tie
    generator = torch.Generator().manual_seed(training.seed)
    initial = torch.zeros(x.shape[1], device=x.device) if start is None else start.log().float()
    theta = _fold(initial, tie).clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=training.learning_rate, weight_decay=0.0)
    half = w.bfloat16()

    best_theta, best_error, best_step = theta.detach().clone(), math.inf, 0
    for step in range(training.steps + 1):
        if step % training.check_every == 0 or step == training.steps:
            scale = _unfold(theta.detach(), tie).exp()
            error = problem.error(scale, tokens=4 * training.batch)
            kept = problem.kept(scale)
            if error < best_error:
                best_theta, best_error, best_step = theta.detach().clone(), error, step
            if step - best_step >= training.patience or step == training.steps:
                break
        rows = torch.randint(len(x), (min(training.batch, len(x)),), generator=generator)
        part = x[rows.to(x.device)].float()
        loss = _loss(part, w, part.bfloat16() @ half.T, _unfold(theta, tie), problem, kept)
        optimizer.param_groups[0]["lr"] = training.learning_rate * _schedule(step, training)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            theta.copy_(centred(theta))
    return _unfold(best_theta, tie).exp(), step


def _loss(
    x: Tensor, w: Tensor, y: Tensor, log_s: Tensor, problem: Problem, kept: Tensor | None
) -> Tensor:
    # NOTE: the products run in bfloat16, whose rounding (2^-9) is small next to that of four bits
    # and only perturbs the gradient; the errors that choose a scale are computed in float32.
    sim = problem.simulation
    size = y.float().norm().clamp_min(1e-30)
    if kept is not None:  # what the branch computes exactly is no part of the error
        x, w = x * kept, w * kept
        y = x.bfloat16() @ w.bfloat16().T
    x_hat = straight_through(sim.transform(x * (-log_s).exp()), sim.activations, sim.rule)
    w_hat = straight_through(sim.transform(w * log_s.exp()), sim.weights, sim.rule)
    rounded = x_hat.bfloat16() @ w_hat.bfloat16().T
    return (rounded.float() - y.float()).norm() / size


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
