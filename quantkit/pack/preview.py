"""What `pack` would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit import console
from quantkit.checkpoint.step import Target, open_source, output_of
from quantkit.formats import FORMATS
from quantkit.kernels import dispatch
from quantkit.pack.forecast import forecast
from quantkit.pack.job import Job, PackOptions, prepare
from quantkit.pack.layout import tensors_of
from quantkit.pack.pack import packed_config, suffix


def preview(
    checkpoint: str | Path | None, options: PackOptions, target: Target
) -> tuple[dict[str, Any], str]:
    """Count linears, bytes in and out and bits per weight by site kind; JSON and text.

    Raises what `pack` would raise before its first tensor.
    """
    source = open_source(checkpoint)
    output = output_of(source, suffix(options), target)
    job = prepare(source, options)
    method = packed_config(job, options)["quantization_config"]["quant_method"]
    (rows, before, after), ends = _by_kind(job), _ends(job)
    before += sum(row["bytes_before"] for row in ends)
    after += sum(row["bytes"] for row in ends)
    rest = sum(info.nbytes for info in source.tensors.values()) - before
    foretold = forecast(job, options, output, after, rest)
    data = {
        "output": str(output),
        "quant_method": method,
        "kinds": rows,
        "outside_blocks": ends,
        "bytes_in": before + rest,
        "bytes_out": after + rest,
        "left_as_they_are": len(source.tensors) - sum(row["linears"] for row in (*rows, *ends)),
        "unmatched": list(job.layout.unmatched),
        **foretold,
        "kernels": _kernels(job),
    }
    table = console.table(
        ("site", "format", "linears", "bits/weight"),
        [(r["kind"], r["format"], r["linears"], f"{r['bits']:.3f}") for r in (*rows, *ends)],
    )
    lines = [
        table,
        f"{data['bytes_in'] / 1e6:.1f} MB -> {data['bytes_out'] / 1e6:.1f} MB, {method}",
        f"{data['left_as_they_are']} tensors stay as they are"
        + (f", {len(job.layout.unmatched)} of them unknown" if job.layout.unmatched else ""),
        f"peak memory about {data['peak_memory_bytes'] / 1e6:.0f} MB"
        + (f", about {data['seconds']:.0f} s" if "seconds" in data else ""),
        f"would run on: {', '.join(data['kernels'])}",
        f"would write {output}",
    ]
    return data, "\n".join(lines)


def _by_kind(job: Job) -> tuple[list[dict[str, Any]], int, int]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    before = after = 0
    for site in job.layout.sites:
        fmt = job.scheme.site(site.key, site.kind)
        for linear in site.linears:
            out, width = linear.shape
            stored = job.source.tensors[linear.tensor].dtype.itemsize * out * width
            packed = stored
            if fmt is not None:
                tensors = tensors_of(fmt, out, width).values()
                packed = sum(dtype.itemsize * _count(shape) for dtype, shape in tensors)
            key = site.kind, "as it is" if fmt is None else fmt.words()
            row = rows.setdefault(
                key, {"kind": key[0], "format": key[1], "linears": 0, "weights": 0, "bytes": 0}
            )
            row["linears"] += 1
            row["weights"] += out * width
            row["bytes"] += packed
            before, after = before + stored, after + packed
    for row in rows.values():
        row["bits"] = 8 * row["bytes"] / row["weights"]
    return list(rows.values()), before, after


def _ends(job: Job) -> list[dict[str, Any]]:
    """The packed matrices outside the blocks, as `_by_kind` has the others."""
    rows = []
    for linear, fmt in job.scheme.ends(job.layout):
        out, width = linear.shape
        tensors = tensors_of(fmt, out, width).values()
        packed = sum(dtype.itemsize * _count(shape) for dtype, shape in tensors)
        rows.append(
            {
                "kind": "embedding" if linear == job.layout.table else "head",
                "format": fmt.weights,
                "linears": 1,
                "weights": out * width,
                "bytes": packed,
                "bytes_before": job.source.tensors[linear.tensor].nbytes,
                "bits": 8 * packed / (out * width),
            }
        )
    return rows


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _kernels(job: Job) -> list[str]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names: dict[str, None] = {}
    layout = job.layout
    sites = [(s, job.scheme.site(s.key, s.kind)) for s in layout.layer_sites(0)]
    used = [(fmt, site.width, tuple(x.shape[0] for x in site.linears)) for site, fmt in sites]
    for fmt, width, outputs in (*used, (job.scheme.head, layout.hidden, (layout.vocab,))):
        if fmt is not None and fmt.weights in FORMATS:
            work = dispatch.Work(
                weights=fmt.weights,
                activations=fmt.activations,
                branch=fmt.branch,
                rule=job.scheme.scale_rule,
                hadamard=fmt.hadamard,
                width=width,
                outputs=outputs,
                outliers=fmt.outliers,
            )
            choice = dispatch.choose(work, device)
            reason = f" ({choice.reason})" if choice.reason else ""
            names[f"{choice.name}{reason}"] = None
    return list(names)
