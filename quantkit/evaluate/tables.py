"""An evaluation's report as text."""

from __future__ import annotations

from typing import Any

from quantkit import console
from quantkit.evaluate import scores


def as_text(report: dict[str, Any]) -> str:
    """The report as tables."""
    kernels = ", ".join(f"{name} ({n} sites)" for name, n in report["kernels"].items())
    ran = kernels or "none was needed (answers of an earlier run)"
    lines = [
        f"{report['checkpoint']}: {report['scheme']}, "
        f"{report['bits_per_weight']:.3f} bits per weight, on {report['device']}",
        f"kernel: {ran if report['formats'] else 'torch'}",
    ]
    if "perplexity" in report:
        lines += ["", *_text_table(report)]
    if "tasks" in report:
        lines += ["", *_task_table(report["tasks"])]
    return "\n".join(lines)


def _text_table(report: dict[str, Any]) -> list[str]:
    part = report["perplexity"]
    rows = []
    if "original" in part:
        before = part["original"]
        bits = f"{report['original_bits_per_weight']:.3f}"
        rows.append(("original", bits, f"{before['perplexity']:.2f}", f"{before['nll']:.4f}", ""))
    after, excess = part["packed"], ""
    if "excess_nll" in part:
        error = part["excess_nll_stderr"]
        excess = f"{part['excess_nll']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
    bits = f"{report['bits_per_weight']:.3f}"
    name = report["scheme"]
    rows.append((name, bits, f"{after['perplexity']:.2f}", f"{after['nll']:.4f}", excess))
    headers = ("", "bits/weight", "perplexity", "nats/token", "excess nats/token")
    return [console.table(headers, rows), f"on {part['data']}"]


def _task_table(part: dict[str, Any]) -> list[str]:
    def shown(score: dict[str, float] | None) -> str:
        return "" if score is None else str(scores.Score(score["value"], score["stderr"]))

    rows = [
        (
            row["task"],
            row["metric"].removesuffix(",none"),
            row["questions"],
            shown(row["original"]),
            shown(row["packed"]),
            shown(row["drop"]),
        )
        for row in part["rows"]
    ]
    headers = ("task", "metric", "questions", "original %", "packed %", "drop (points)")
    shots = sorted({s["shots"] for s in part["settings"].values()})
    how = f"lm-eval {part['lm_eval']}, {', '.join(map(str, shots))} shots, "
    how += "chat template" if part["chat_template"] else "no chat template"
    return [console.table(headers, rows), how]


def dry_run_text(found: dict[str, Any]) -> str:
    """What would be evaluated, as text."""
    lines = [f"{found['checkpoint']}: {found['scheme']}, on {found['device']}"]
    lines.append(f"beside {found['original'] or 'nothing: no original is here'}")
    if "text" in found:
        time = f", about {found['seconds']:.0f} s" if "seconds" in found else ""
        lines.append(f"text: {found['text']}; {found['tokens']:,} tokens to compute{time}")
    for name, count in found.get("questions", {}).items():
        lines.append(f"{name}: {count} questions ({found['data'][name]})")
    memory = f"{found['peak_memory_bytes'] / 1e9:.2f} GB of memory"
    lines.append(f"{found['bytes_read'] / 1e9:.2f} GB read, about {memory}")
    return "\n".join(lines)
