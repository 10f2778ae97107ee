"""What a checkpoint is and what was done to it: the data behind `quantkit inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quantkit import console
from quantkit.checkpoint.measure import Linears, outside_formats, site_formats, sizes
from quantkit.checkpoint.reader import Checkpoint

_SHAPE_KEYS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "vocab_size": "vocab",
    "num_experts": "experts",
    "num_local_experts": "experts",
}


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, sizes, format per site, true bits per weight and the steps so far, as data."""
    config, counted = checkpoint.config, sizes(checkpoint)
    architectures = config.get("architectures")
    formats = site_formats(config, counted.linears) | outside_formats(checkpoint, counted)
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        key = str(info.dtype).removeprefix("torch.")
        dtypes[key] = dtypes.get(key, 0) + info.nbytes
    return {
        "path": str(checkpoint.path),
        "model_type": config.get("model_type"),
        "architecture": architectures[0]
        if isinstance(architectures, list) and architectures
        else None,
        "shape": {
            k: config[key] for key, k in _SHAPE_KEYS.items() if isinstance(config.get(key), int)
        },
        "tied": config.get("tie_word_embeddings") is True,
        "tensors": len(checkpoint.tensors),
        "shards": len(checkpoint.shards),
        "parameters": counted.parameters,
        "bytes": counted.nbytes,
        "bytes_by_dtype": dtypes,
        "bits_per_weight": round(counted.linear_bits, 4),
        "bits_per_parameter": round(counted.model_bits, 4),
        "sites": [_row(part, formats) for part in counted.linears],
        "outside_blocks": [_row(part, formats) for part in counted.outside],
        "steps": [asdict(step) for step in checkpoint.manifest.steps]
        if checkpoint.manifest
        else [],
        "weights_digest": checkpoint.manifest.weights_digest if checkpoint.manifest else None,
        "needs_remote_code": "auto_map" in config,
    }


def _row(part: Linears, formats: dict[str, str]) -> dict[str, Any]:
    return {
        "site": part.kind,
        "linears": part.count,
        "format": formats.get(part.kind, "unknown"),
        "weights": part.weights,
        "bytes": part.nbytes,
        "bits_per_weight": round(part.bits, 4),
    }


def as_text(data: dict[str, Any]) -> str:
    """The same for people."""
    shape = ", ".join(f"{key} {value}" for key, value in data["shape"].items())
    dtypes = ", ".join(f"{name} {_size(n)}" for name, n in data["bytes_by_dtype"].items())
    lines = [
        f"{data['path']}: {_clean(data['architecture'] or data['model_type'] or 'unknown')}"
        f"{', tied head' if data['tied'] else ''}",
        f"  {shape}",
        f"  {data['parameters']:,} parameters in {data['tensors']} tensors and {data['shards']} "
        f"files, {_size(data['bytes'])} ({dtypes})",
        f"  {data['bits_per_weight']:.3f} bits per weight of the decoder linears, "
        f"{data['bits_per_parameter']:.3f} per parameter of the whole model",
    ]
    if data["needs_remote_code"]:
        lines.append("  config.json names code of its own (auto_map); quantkit never runs it")
    if data["sites"]:
        rows = [
            (
                s["site"],
                s["linears"],
                _clean(s["format"]),
                _size(s["bytes"]),
                f"{s['bits_per_weight']:.3f}",
            )
            for s in (*data["sites"], *data["outside_blocks"])
        ]
        headers = ("site", "linears", "format", "size", "bits/weight")
        lines += ["", console.table(headers, rows)]
    lines += ["", "steps so far:" if data["steps"] else "no steps so far"]
    for number, step in enumerate(data["steps"], 1):
        options = " ".join(f"{key}={value}" for key, value in step["options"].items())
        peak = f", {_size(step['peak_memory_bytes'])} peak" if step["peak_memory_bytes"] else ""
        lines.append(
            f"  {number}. {_clean(step['verb'])} {_clean(options)} ({step['seconds']:.1f} s{peak})"
        )
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def _clean(text: object) -> str:
    """Text of a stranger's file without control characters, at most 300 long."""
    return "".join(c if c.isprintable() else "?" for c in str(text))[:300]
