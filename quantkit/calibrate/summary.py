"""What calibration found, per kind of site."""

from __future__ import annotations

from typing import Any

from quantkit import console
from quantkit.calibrate.layerwise import Result
from quantkit.model.sites import KINDS

COLUMNS = ("kurtosis", "absmax/rms", "severity", "density 32", "density 64")


def summarize(result: Result) -> tuple[dict[str, Any], str]:
    """Average over layers: the largest channel kurtosis, absmax over RMS, absmax of the largest
    channel over the median one, and clustering density; as data and as a table."""
    statistics, sites = result.statistics, {}
    for kind in KINDS:
        rows = []
        for site in result.layout.sites:
            if site.kind != kind or not statistics.has(site.key):
                continue
            absmax = statistics.get(site.key, "absmax").double()
            count = int(statistics.get(site.key, "count"))
            rms = (statistics.get(site.key, "energy").mean() / count).sqrt()
            rows.append(
                (
                    float(statistics.kurtosis(site.key).max()),
                    float(absmax.max() / rms),
                    float(absmax.max() / absmax.median().clamp(min=1e-30)),
                    float(statistics.density(site.key, 32).nanmean()),
                    float(statistics.density(site.key, 64).nanmean()),
                )
            )
        means = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        sites[kind] = dict(zip(COLUMNS, means, strict=False))
    data = {
        "output": str(result.output),
        "data": result.description,
        "sites": sites,
        "starved_experts": list(result.starved),
        "unmatched_tensors": len(result.layout.unmatched),
    }
    lines = [f"data: {result.description}"]
    table = [
        (kind, *(f"{value:.{2 if 'density' in name else 1}f}" for name, value in found.items()))
        for kind, found in sites.items()
        if found
    ]
    lines.append(console.table(("site", *COLUMNS), table))
    if result.starved:
        some = ", ".join(result.starved[:3])
        more = ", ..." if len(result.starved) > 3 else ""
        lines.append(f"{len(result.starved)} experts saw few tokens: {some}{more}")
        lines.append("  only their weights will be looked at; --all-experts shows them every token")
    if result.layout.unmatched:
        lines.append(f"{len(result.layout.unmatched)} tensors belong to nothing known")
    lines.append(f"output: {result.output}")
    return data, "\n".join(lines)
