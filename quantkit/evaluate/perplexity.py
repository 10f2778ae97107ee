"""Next-token loss per token, and what quantization adds to it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.console import Progress

ROWS = 1024
"""Rows of logits turned into losses at once: bounds the float32 copy to ROWS x vocabulary."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits [.., vocab] and target ids [..] into losses [..], nats, in float32.

    The softmax runs in float32 whatever the type of the logits, a slice of rows at a time.
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    losses = [
        torch.nn.functional.cross_entropy(
            flat[i : i + ROWS].float(), wanted[i : i + ROWS], reduction="none"
        )
        for i in range(0, len(flat), ROWS)
    ]
    return torch.cat(losses).reshape(targets.shape)


@torch.no_grad()  # inference tensors would not be shared between q, k and v
def negative_log_likelihood(
    model: Any, tokens: Tensor, *, batch: int = 1, progress: Progress | None = None
) -> Tensor:
    """Run `model` over windows of tokens; the loss of every predicted token.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: [n, seq] integers; each row is one independent window, no token is added.
        batch: windows per forward pass.

    Returns:
        float32 [n, seq - 1] on the CPU, in nats: entry [i, t] is -log p(token t+1 | tokens 0..t).
    """
    device = next(iter(model.parameters())).device
    losses = []
    for start in range(0, len(tokens), batch):
        window = tokens[start : start + batch].to(device).long()
        logits = model(input_ids=window, use_cache=False).logits[:, :-1]
        losses.append(token_losses(logits, window[:, 1:]).cpu())
        if progress is not None:
            progress.advance(len(window))
    return torch.cat(losses)


@dataclass(frozen=True)
class Excess:
    """What a model loses against another one on the same tokens.

    `mean` is nats per token; `stderr` its standard error from the spread of the paired
    differences between windows (tokens of a window are not independent, windows nearly are);
    None with a single window.
    """

    mean: float
    stderr: float | None
    windows: int

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return f"{self.mean:+.4f}{error}"


def compare(reference: Tensor, nll: Tensor) -> Excess:
    """Excess loss of `nll` over `reference`, both [windows, tokens] in nats, paired by window."""
    if reference.shape != nll.shape:
        raise ValueError(f"losses of different tokens: {reference.shape} and {nll.shape}")
    difference = (nll.double() - reference.double()).mean(1)
    n = len(difference)
    stderr = float(difference.std(unbiased=True)) / math.sqrt(n) if n > 1 else None
    return Excess(float(difference.mean()), stderr, n)


@dataclass(frozen=True)
class Loss:
    """Mean loss in nats per token and its exponential, the perplexity."""

    nll: float
    perplexity: float

    def as_dict(self) -> dict[str, float]:
        """The two numbers, for JSON."""
        return asdict(self)


def summarise(nll: Tensor) -> Loss:
    """Mean over all tokens (in float64) of losses [windows, tokens]."""
    mean = float(nll.double().mean())
    # a broken model can exceed what exp() can hold; infinity is the honest perplexity then
    return Loss(mean, math.exp(mean) if mean < 700 else math.inf)
