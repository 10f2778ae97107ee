"""Time and peak memory of every step on random checkpoints: the same blocks, more and more of them.

    python benchmarks/scale.py [--sizes 1 2 4 8] [--moe 2] [--folder DIR] [--output scale]

Each step runs in a process of its own on the CPU; its memory is that process's peak resident set
less that of an interpreter that only imported torch. Calibrate and pack are asked first what they
will take (--dry-run). Writes OUTPUT.json and OUTPUT.md, to what OUTPUT.json holds already; needs
free disk of about three times the largest size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_checkpoint import Model

DENSE = Model(hidden=1536, intermediate=6144, heads=12, kv_heads=12, vocab=16000)
MIXTURE = Model(
    hidden=1024, intermediate=512, heads=8, kv_heads=4, vocab=16000, experts=32, chosen=4
)
WINDOWS = (4, 128)
TOKENS = ["--data", "tokens.safetensors:ids", "--seq-len", "128"]

# Verb, options, input, and what is no longer needed behind it.
STEPS: tuple[tuple[str, list[str], str, tuple[str, ...]], ...] = (
    ("calibrate", [*TOKENS, "--device", "cpu"], "model", ()),
    ("smooth", ["--method", "max", "--no-check"], "model-calibrated", ("model-smoothed",)),
    ("separate-outliers", [], "model-calibrated", ()),
    ("rotate", ["--kind", "hadamard"], "model-separated", ("model-rotated",)),
    ("pack", ["--scheme", "osc", "--device", "cpu"], "model-separated", ()),
    ("export", ["--fold-outliers", "--windows", "0", *TOKENS], "model-osc", ()),
)
PREDICTED = ("calibrate", "pack")


def run(command: list[str], folder: Path) -> tuple[str, int, float, float]:
    """Run a command; gives its output, peak resident bytes, seconds and processor seconds."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.monotonic() - start
    return said, usage.ru_maxrss * 1024, seconds, usage.ru_utime + usage.ru_stime


def one_size(
    folder: Path, model: Model, gigabytes: float, torch_alone: int, wanted: list[str]
) -> dict[str, Any]:
    """Build a checkpoint, run the steps on it, and give what each one took."""
    layers = model.layers(gigabytes)
    # In a process of its own: what this one holds would count as its children's.
    code = (
        "import pathlib, random_checkpoint as r; "
        f"r.build(pathlib.Path({str(folder)!r}), r.{model!r}, {layers}, {WINDOWS})"
    )
    path = {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | path)
    size = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
    steps = {}
    for verb, options, source, finished in STEPS:
        if verb not in wanted:
            continue
        command = [sys.executable, "-m", "quantkit", verb, source, *options]
        row: dict[str, Any] = {}
        if verb in PREDICTED:
            said, _, seconds, _ = run([*command, "--dry-run", "--json"], folder)
            plan = json.loads(said)
            row["predicted_above"] = plan["peak_memory_bytes"] - torch_alone
            row["predicted_seconds"] = plan["seconds"]
            row["dry_run_seconds"] = round(seconds, 1)
        _, most, seconds, busy = run([*command, "-q"], folder)
        row |= {"peak": most, "above": most - torch_alone}
        row |= {"seconds": round(seconds, 1), "processor_seconds": round(busy, 1)}
        steps[verb] = row
        print(f"{size / 1e9:5.2f} GB  {verb:18s} {shown(row)}", file=sys.stderr, flush=True)
        for name in finished:
            shutil.rmtree(folder / name)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return {"gigabytes": size / 1e9, "layers": layers, "experts": model.experts, "steps": steps}


def shown(row: dict[str, Any]) -> str:
    """One step's row for people."""
    text = f"{row['above'] / 1e6:6.0f} MB {row['seconds']:6.1f} s"
    text += f" ({row['processor_seconds']:.1f} s of processors)"
    if "predicted_seconds" in row:
        text += f", foretold {row['predicted_above'] / 1e6:.0f} MB,"
        text += f" {row['predicted_seconds']:.1f} s"
    return text


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a step, a column a size, then how memory and time grow."""
    dense = [r for r in results if not r["experts"]]
    names = [f"{r['gigabytes']:.1f} GB" + (" MoE" if r["experts"] else "") for r in results]
    lines = [
        f"| step | {' | '.join(names)} | memory grows | processor time per GB |",
        "|---|" + "---|" * (len(names) + 2),
    ]
    for verb, *_ in STEPS:
        cells = [shown(r["steps"][verb]).strip() if verb in r["steps"] else "" for r in results]
        ran = [r for r in dense if verb in r["steps"]]
        growth = span = ""
        if ran:
            first, last = (r["steps"][verb]["above"] for r in (ran[0], ran[-1]))
            growth = f"{100 * (last / first - 1):+.0f} %"
            rates = [r["steps"][verb]["processor_seconds"] / r["gigabytes"] for r in ran]
            span = f"{min(rates):.1f} to {max(rates):.1f} s"
        lines.append(f"| {verb} | {' | '.join(cells)} | {growth} | {span} |")
    return "\n".join(lines)


def main() -> None:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 2, 4, 8], help="gigabytes")
    parser.add_argument("--moe", type=float, default=2, help="gigabytes of the mixture; 0: none")
    verbs = [verb for verb, *_ in STEPS]
    parser.add_argument("--steps", nargs="+", default=verbs, choices=verbs)
    parser.add_argument("--folder", type=Path, help="where to work (an empty folder is made there)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    kept = options.output.with_suffix(".json") if options.output else None
    results = json.loads(kept.read_text()) if kept and kept.exists() else []
    again = {(0, DENSE.layers(size)) for size in options.sizes}
    again.add((MIXTURE.experts, MIXTURE.layers(options.moe)))
    results = [r for r in results if (r["experts"], r["layers"]) not in again]
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        _, torch_alone, *_ = run([sys.executable, "-c", "import torch"], folder)
        wanted = [(DENSE, size) for size in options.sizes]
        wanted += [(MIXTURE, options.moe)] if options.moe else []
        for model, size in wanted:
            results.append(one_size(folder, model, size, torch_alone, options.steps))
    results.sort(key=lambda found: (found["experts"], found["gigabytes"]))
    if kept:
        kept.write_text(json.dumps(results, indent=1) + "\n")
        kept.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
