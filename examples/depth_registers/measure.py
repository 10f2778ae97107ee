"""The W4A4 diagnosis of one trained model: where it breaks and what repairs it.

Everything is simulated on the model itself: a quantized linear sees `Q(x T) Q(T^-1 W)` with `T`
nothing, a SmoothQuant scale, or a Hadamard of the site's width or of blocks of 32. Sites are named
as in the rest of the project: readers `attn_in`, `mlp_in`; generators `attn_out`, `mlp_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from quantkit.formats import mxfp4
from quantkit.transforms.hadamard import rotate

SITES = {
    "attn_in": ("q_proj", "k_proj", "v_proj"),
    "attn_out": ("o_proj",),
    "mlp_in": ("gate_proj", "up_proj"),
    "mlp_out": ("down_proj",),
}
READERS, GENERATORS = ("attn_in", "mlp_in"), ("attn_out", "mlp_out")
ALL = (*READERS, *GENERATORS)


def int4_rows(x: torch.Tensor) -> torch.Tensor:
    """Symmetric INT4 with one absmax scale a row: per token, or per output channel."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return ((x.float() / scale).round().clamp(-7, 7) * scale).to(x.dtype)


def mxfp4_blocks(x: torch.Tensor) -> torch.Tensor:
    """MXFP4, blocks of 32, the even rule."""
    return mxfp4.fake_quantize(x, "even")


QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int4": int4_rows,
    "mxfp4": mxfp4_blocks,
}


def linears(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """(site kind, module) of every decoder linear of the kinds."""
    for name, module in model.named_modules():
        for kind in kinds:
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in SITES[kind]:
                yield kind, module


@contextmanager
def quantized(
    model: nn.Module,
    kinds: tuple[str, ...],
    quantizer: str,
    transform: str = "none",
    transformed: tuple[str, ...] = ALL,
    channel_max: dict[nn.Module, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Quantize weights and inputs of the linears of `kinds` while the context is open.

    `transform`: none, smooth, block (Hadamard of 32) or full (Hadamard of the whole width), applied
    at the kinds in `transformed`.
    """
    q = QUANTIZERS[quantizer]
    saved: list[tuple[nn.Linear, torch.Tensor]] = []
    handles = []
    try:
        for kind, module in linears(model, kinds):
            weight = module.weight.data
            saved.append((module, weight))
            how = transform if kind in transformed else "none"
            before: Callable[[torch.Tensor], torch.Tensor]
            if how == "smooth":
                assert channel_max is not None
                peak = channel_max[module].clamp_min(1e-5)
                scale = (peak / weight.abs().amax(0).clamp_min(1e-5)).sqrt().to(weight.dtype)
                module.weight.data = q(weight * scale)
                before = lambda x, s=scale: q(x / s)  # noqa: E731
            elif how in ("block", "full"):
                size = 32 if how == "block" else weight.shape[1]
                module.weight.data = q(rotate(weight, size))
                before = lambda x, n=size: q(rotate(x, n))  # noqa: E731
            else:
                module.weight.data = q(weight)
                before = q
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, f=before: (f(args[0]),))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in saved:
            module.weight.data = weight


@torch.no_grad()
def nll(model: Any, windows: torch.Tensor) -> float:
    """Mean negative log-likelihood, nats a token, of token windows [n, sequence]."""
    total, count = 0.0, 0
    for ids in windows.split(16):
        logits = model(ids).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return total / count


@torch.no_grad()
def activation_statistics(
    model: Any, windows: torch.Tensor
) -> tuple[dict[nn.Module, torch.Tensor], dict[str, list[float]]]:
    """Channel absmax per linear, and the channel-max excess kurtosis per site kind and layer."""
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args: seen.setdefault(m, []).append(args[0].flatten(0, -2).float().cpu())
        )
        for _, module in linears(model, ALL)
    ]
    for ids in windows.split(16):
        model(ids)
    for handle in handles:
        handle.remove()
    peak: dict[nn.Module, torch.Tensor] = {}
    kurtosis: dict[str, list[float]] = {kind: [] for kind in ALL}
    first = {kinds[0] for kinds in SITES.values()}  # a site's linears share one input
    names = {module: name for name, module in model.named_modules()}
    for kind, module in linears(model, ALL):
        # Registers pass through k_proj and v_proj as well: their rows are part of that input.
        x = torch.cat(seen.pop(module)).double()
        peak[module] = x.abs().amax(0).float().to(module.weight.device)
        if names[module].rsplit(".", 1)[-1] in first:
            centred = x - x.mean(0)
            variance = centred.pow(2).mean(0).clamp_min(1e-20)
            kurtosis[kind].append(float((centred.pow(4).mean(0) / variance**2 - 3).amax()))
    return peak, kurtosis


@torch.no_grad()
def noise_curve(model: Any, windows: torch.Tensor, kind: str, base: float) -> list[list[float]]:
    """[sigma_rel, excess NLL]: Gaussian noise of sigma_rel times each channel's deviation."""
    curve = []
    for sigma in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3):
        generator = torch.Generator(device=windows.device).manual_seed(0)

        def add(_m: Any, args: Any, s: float = sigma, g: torch.Generator = generator) -> Any:
            x = args[0]
            deviation = x.flatten(0, -2).float().std(0)
            noise = torch.randn(x.shape, device=x.device, generator=g)
            return ((x.float() + s * deviation * noise).to(x.dtype),)

        handles = [m.register_forward_pre_hook(add) for _, m in linears(model, (kind,))]
        curve.append([sigma, nll(model, windows) - base])
        for handle in handles:
            handle.remove()
    return curve


def slope(curve: list[list[float]]) -> float:
    """Least-squares slope of log excess NLL on log sigma; points without excess are left out."""
    points = torch.tensor([p for p in curve if p[1] > 1e-5], dtype=torch.float64).log()
    if len(points) < 2:
        return float("nan")
    x, y = (points - points.mean(0)).unbind(1)
    return float((x * y).sum() / (x * x).sum())


def diagnose(model: Any, calibration: torch.Tensor, held: torch.Tensor) -> dict[str, Any]:
    """Every figure of the table for one model, from token windows [n, sequence] on its device."""
    base = nll(model, held)
    peak, kurtosis = activation_statistics(model, calibration)
    found: dict[str, Any] = {"bf16_nll": base, "perplexity": float(torch.tensor(base).exp())}
    found["kurtosis"] = kurtosis

    def excess(kinds: tuple[str, ...], quantizer: str, *how: Any) -> float:
        with quantized(model, kinds, quantizer, *how, channel_max=peak):
            return nll(model, held) - base

    for quantizer in QUANTIZERS:
        naive = excess(ALL, quantizer)
        sets = {**{k: (k,) for k in ALL}, "readers": READERS, "generators": GENERATORS}
        found[quantizer] = {
            "naive": naive,
            "delta_add": {name: excess(kinds, quantizer) for name, kinds in sets.items()},
            "delta_remove": {
                name: naive - excess(tuple(k for k in ALL if k not in kinds), quantizer)
                for name, kinds in sets.items()
            },
            "reader_rescued": excess(GENERATORS, quantizer),
            "smoothquant": excess(ALL, quantizer, "smooth"),
            "block_hadamard": excess(ALL, quantizer, "block"),
            "full_rotation_readers": excess(ALL, quantizer, "full", READERS),
            "full_rotation": excess(ALL, quantizer, "full", ALL),
        }
    curves = {kind: noise_curve(model, held, kind, base) for kind in GENERATORS}
    found["noise"] = {k: {"curve": c, "slope": slope(c)} for k, c in curves.items()}
    return found
