"""A diagnosis as text."""

from __future__ import annotations

from typing import Any

from quantkit import console
from quantkit.model.sites import KINDS


def without_rasters(report: dict[str, Any]) -> dict[str, Any]:
    """The report less what is only good for a picture."""
    sites = [{k: v for k, v in site.items() if k != "raster"} for site in report["sites"]]
    return {**report, "sites": sites}


def _signed(part: dict[str, Any]) -> str:
    error = "" if part["stderr"] is None else f" ± {part['stderr']:.4f}"
    return f"{part['excess_nll']:+.4f}{error}"


def as_text(report: dict[str, Any]) -> str:
    """What each set of sites costs, what the inputs look like, noise slopes and schemes."""
    scheme = report["scheme"]["scheme"]
    lines = [
        f"{report['checkpoint']}: perplexity {report['plain']['perplexity']:.2f}; all linears in "
        f"{scheme}: {_signed(report['rounded'])} nats/token",
        "",
        _sets(report),
        "left out: what a fully rounded model gains when the set stays in 16 bits; "
        "alone: what is lost when only the set is rounded",
        "",
        _sites(report),
        "",
        _schemes(report),
        f"on {report['data']}",
    ]
    if "page" in report:
        lines.append(f"page: {report['page']}")
    return "\n".join(lines)


def _sets(report: dict[str, Any]) -> str:
    layers = [s for s in report["sets"] if s["group"] == "layer"]
    worst = sorted(layers, key=lambda s: -s["remove"]["excess_nll"])[:3]
    rows = []
    for each in [s for s in report["sets"] if s["group"] != "layer"] + worst:
        per_bit = "-" if each["nats_per_bit"] is None else f"{each['nats_per_bit']:.4f}"
        bits = f"{each['extra_bits']:.2f}"
        rows.append((each["name"], _signed(each["remove"]), _signed(each["add"]), bits, per_bit))
    headers = ("set", "left out", "alone", "bits it would cost", "nats per bit")
    return console.table(headers, rows)


def _sites(report: dict[str, Any]) -> str:
    slopes = {curve["kind"]: curve["slope"] for curve in report["noise"]}
    rows = []
    for kind in KINDS:
        views = [v for v in report["sites"] if v["kind"] == kind]
        if not views:
            continue
        row: list[str] = [kind]
        for name in ("kurtosis", "severity", "crest", "density"):
            values = [v[name] for v in views if v[name] is not None]
            row.append(f"{sum(values) / len(values):.2f}" if values else "-")
        used = [v["bound_use"] for v in views if v["bound_use"] is not None]
        row.append(f"{100 * max(used):.0f}%" if used else "-")
        slope = slopes.get(kind)
        row.append("-" if slope is None else f"{slope:.2f}")
        rows.append(row)
    headers = ("site", "kurtosis", "severity", "crest", "density", "norm bound used", "noise slope")
    return console.table(headers, rows)


def _schemes(report: dict[str, Any]) -> str:
    rows = [
        (p["name"], f"{p['bits']:.3f}", _signed(p), "yes" if p["frontier"] else "")
        for p in report["pareto"]
    ]
    return console.table(("scheme", "bits/weight", "excess nats/token", "unbeaten"), rows)


def dry_run_text(found: dict[str, Any]) -> str:
    """What would be diagnosed."""
    schemes = ", ".join(found["schemes"])
    return "\n".join(
        [
            f"{found['checkpoint']}: {found['sets']} sets of sites; schemes {schemes}",
            f"text: {found['data']}",
            f"{found['block_passes']} passes of a block over all windows "
            f"({found['whole_passes']:.1f} times the whole model; "
            f"{found['passes_if_run_apart']} sets run apart would take as many)",
            f"about {found['seconds'] / 60:.0f} minutes and "
            f"{found['peak_memory_bytes'] / 1e9:.2f} GB of memory; kernel: reference",
        ]
    )
