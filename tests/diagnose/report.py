"""A report of the shape `diagnose` gives, made up: three layers, every figure filled."""

from __future__ import annotations

from typing import Any

from quantkit.model.sites import KINDS

LAYERS = 3


def _excess(mean: float) -> dict[str, float]:
    return {"excess_nll": mean, "stderr": 0.01 + abs(mean) / 20}


def _set(name: str, group: str, gain: float) -> dict[str, Any]:
    return {
        "name": name,
        "group": group,
        "add": _excess(gain * 0.7),
        "remove": _excess(gain),
        "extra_bits": 2.0,
        "nats_per_bit": gain / 2,
    }


def _site(layer: int, kind: str) -> dict[str, Any]:
    levels = ["".join(str((t * (c + 1) + layer) % 10) for t in range(40)) for c in range(4)]
    return {
        "key": f"layers.{layer}.{kind}",
        "layer": layer,
        "kind": kind,
        "tokens": 40,
        "kurtosis": 10.0 * (layer + 1),
        "severity": 5.0,
        "crest": 3.0,
        "density": None if layer == 0 else 0.5,
        "absmax": 9.0,
        "rms": 1.0,
        "bound_use": 0.6 if kind.endswith("in") else None,
        "raster": [(7 * c, row) for c, row in enumerate(levels)],
    }


def small_report() -> dict[str, Any]:
    """A fresh copy each time."""
    gains = dict(zip(KINDS, (0.4, 0.1, 0.6, -0.02), strict=True))
    sets = [_set(kind, "kind", gain) for kind, gain in gains.items()]
    sets += [_set("readers", "role", 1.0), _set("generators", "role", 0.5)]
    sets += [_set(f"layer {n}", "layer", 0.1 * n) for n in range(LAYERS)]
    schemes = ("mxfp4", "nvfp4", "osc")
    points = [
        {"name": name, "bits": 4.25 + n, "frontier": True, **_excess(1.0 / (n + 1))}
        for n, name in enumerate((*schemes, "mxfp4, mlp_in bf16"))
    ]
    errors = {
        name: [0.1 * (n + 1) + 0.05 * i for i in range(LAYERS)] for n, name in enumerate(schemes)
    }
    noise = [
        {
            "kind": kind,
            "slope": 1.9,
            "points": [{"sigma": s, **_excess(s * s)} for s in (0.01, 0.1, 0.3)],
        }
        for kind in KINDS
    ]
    return {
        "checkpoint": "/models/tiny",
        "scheme": {"scheme": "mxfp4", "scale_rule": "even"},
        "data": "made up",
        "windows": 4,
        "seq_len": 40,
        "device": "cpu",
        "kernel": "reference",
        "layers": LAYERS,
        "plain": {"nll": 3.0, "perplexity": 20.1},
        "rounded": _excess(1.1),
        "sets": sets,
        "pareto": points,
        "noise": noise,
        "sites": [_site(layer, kind) for layer in range(LAYERS) for kind in KINDS],
        "local_error": errors,
        "drift": errors,
        "compared": [{"checkpoint": "/models/before", "local_error": {"mxfp4": [0.3, 0.4, 0.5]}}],
        "versions": {},
        "seed": 0,
    }
