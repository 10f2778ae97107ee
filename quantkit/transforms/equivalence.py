"""Whether two checkpoints are the same function: their logits, in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.model.families import make_known


@torch.no_grad()
def logits(path: str | Path, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits [batch, sequence, vocabulary] of a checkpoint (packed or not) computed in `dtype`.

    Norms, which transformers always computes in float32, follow `dtype` too: in float64 what is
    left between two equivalent checkpoints is the rounding of their weights.
    """
    model = _load(Path(path), dtype)
    with _norms_in(model, dtype):
        return model(input_ids=tokens, use_cache=False).logits


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference between two sets of logits, relative to the largest of `a`."""
    return float((a - b).abs().max() / a.abs().max())


def _load(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    make_known(open_checkpoint(path).config.get("model_type"))
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        from quantkit.runtime.load import load

        return load(path, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        experts_implementation="eager",
    )
    return model.eval()


@contextmanager
def _norms_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
        norm.forward = _norm(norm, offset, dtype)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _norm(norm: Any, offset: float, dtype: torch.dtype) -> Any:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(x: Tensor) -> Tensor:
        wide = x.to(dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return wide * (offset + norm.weight.to(dtype))

    return forward
