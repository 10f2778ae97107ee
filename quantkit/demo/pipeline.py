"""`quantkit demo`: calibrate, separate outliers, pack and evaluate a small model, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import console
from quantkit.checkpoint.step import Target
from quantkit.demo.model import demo_model

SCHEMES = ("mxfp4", "osc")


@dataclass(frozen=True)
class Options:
    """Where to work and how much to look at."""

    checkpoint: str | None = None
    folder: Path = Path("quantkit-demo")
    samples: int = 32
    windows: int = 16
    seq_len: int = 1024
    device: str = "auto"
    seed: int = 0


def demo(options: Options) -> dict[str, Any]:
    """Run every step on the shipped sample text; what they cost and what was lost, as data.

    Calibration reads the training part of the sample, evaluation its held-out part. Each step is
    the one its verb runs; the outputs stay in `folder` to be looked at.
    """
    from quantkit.calibrate.layerwise import Options as CalibrateOptions
    from quantkit.calibrate.layerwise import calibrate
    from quantkit.checkpoint.source import resolve
    from quantkit.outliers.separate import separate_outliers
    from quantkit.pack.job import PackOptions
    from quantkit.pack.pack import pack

    began = time.monotonic()
    model = resolve(options.checkpoint) if options.checkpoint else demo_model()
    folder, seconds = options.folder, {"model": time.monotonic() - began}
    folder.mkdir(parents=True, exist_ok=True)

    def target(name: str) -> Target:
        return Target(folder / name, overwrite=True)

    def step(verb: str, said: str) -> float:
        console.note(f"\n$ quantkit {said}")
        return time.monotonic()

    calibrated, separated = folder / "calibrated", folder / "separated"
    started = step("calibrate", f"calibrate {model} --data sample -o {calibrated}")
    calibration = CalibrateOptions(
        "sample",
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
        device=options.device,
    )
    calibrate(model, calibration, target("calibrated"))
    seconds["calibrate"] = time.monotonic() - started
    started = step("separate-outliers", f"separate-outliers {calibrated} -o {separated}")
    separate_outliers(calibrated, target("separated"))
    seconds["separate-outliers"] = time.monotonic() - started
    for scheme in SCHEMES:
        said = f"pack {separated} --scheme {scheme} -o {folder / scheme}"
        started = step("pack", said)
        pack(separated, PackOptions(scheme), target(scheme))
        seconds[f"pack {scheme}"] = time.monotonic() - started
    reports = {}
    for scheme in SCHEMES:
        started = step("eval", f"eval {folder / scheme} --limit {options.windows}")
        reports[scheme] = _evaluate(folder / scheme, model, options)
        seconds[f"eval {scheme}"] = time.monotonic() - started
    return summary(model, reports, seconds)


def _evaluate(checkpoint: Path, model: Path, options: Options) -> dict[str, Any]:
    from quantkit.evaluate import run

    text = run.Text("sample", options.windows, options.seq_len)
    plan = run.prepare(
        checkpoint, source=str(model), text=text, device=options.device, seed=options.seed
    )
    return run.evaluate(plan)


def summary(
    model: Path, reports: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> dict[str, Any]:
    """The rows of the final table, and the share of mxfp4's loss that osc recovers."""
    first = next(iter(reports.values()))
    rows = [
        {
            "scheme": "original",
            "bits_per_weight": first["original_bits_per_weight"],
            "kernel": "torch",
            **first["perplexity"]["original"],
        }
    ]
    for scheme, report in reports.items():
        measured = report["perplexity"]
        rows.append(
            {
                "scheme": scheme,
                "bits_per_weight": report["bits_per_weight"],
                "kernel": ", ".join(report["kernels"]) or "kept from before",
                **measured["packed"],
                "excess_nll": measured["excess_nll"],
                "excess_nll_stderr": measured["excess_nll_stderr"],
            }
        )
    excess = {r["scheme"]: r["excess_nll"] for r in rows[1:]}
    return {
        "model": str(model),
        "data": first["perplexity"]["data"],
        "device": first["device"],
        "rows": rows,
        "recovered_percent": 100 * (1 - excess["osc"] / excess["mxfp4"]),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """The final table."""
    rows = []
    for row in found["rows"]:
        excess = ""
        if "excess_nll" in row:
            excess = f"{row['excess_nll']:+.4f}"
            if row["excess_nll_stderr"] is not None:
                excess += f" ± {row['excess_nll_stderr']:.4f}"
        bits, perplexity = f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.2f}"
        rows.append((row["scheme"], bits, perplexity, excess, row["kernel"]))
    headers = ("scheme", "bits/weight", "perplexity", "excess nats/token", "kernel")
    total = sum(found["seconds"].values())
    return "\n".join(
        [
            console.table(headers, rows),
            f"on {found['data']}",
            f"osc recovers {found['recovered_percent']:.0f} % of what mxfp4 loses; "
            f"{total:.0f} s in all, on {found['device']}",
        ]
    )
