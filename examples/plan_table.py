"""Plans beside uniform schemes at the same bits, over several draws of calibration text.

    python examples/plan_table.py model/ --data wikitext --bits 4.75 --seeds 3 -o plans

For each seed the model is calibrated on other windows and planned for the budget; plan and uniform
schemes are packed, to nearest and by GPTQ, and evaluated on the same held-out text. `--data` can be
given several times in place of seeds (files of token ids have an order of their own). Every number
is kept in the output folder, so an interrupted run continues; `--rows` and `--runs` do a part of
the table, for several processes side by side. Prints the table; writes table.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quantkit import console
from quantkit.calibrate import layerwise
from quantkit.checkpoint.step import Target
from quantkit.evaluate.run import Text, evaluate, prepare
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.plan.run import Options, plan

ROUNDINGS = ("rtn", "gptq")
UNIFORM: dict[str, Callable[[str], PackOptions]] = {
    "nvfp4": lambda how: PackOptions("nvfp4", rounding=how),
    "nvfp4 + fp8 branch": lambda how: PackOptions("w4a4", rounding=how),
    "osc 4-bit, groups of 32": lambda how: PackOptions("osc", mlp_out="mxfp4", rounding=how),
    "osc, groups of 32": lambda how: PackOptions("osc", rounding=how),
}
PLAN = "plan"
ROWS = [f"{name}, {how}" for name in (PLAN, *UNIFORM) for how in ROUNDINGS]


def calibrated(model: str, folder: Path, data: str, seed: int, device: str) -> Path:
    """Calibrate the model on the run's text."""
    output = folder / "calibrated"
    if not output.exists():
        options = layerwise.Options(data, samples=64, seq_len=1024, seed=seed, device=device)
        layerwise.calibrate(model, options, Target(output))
    return output


def planned(source: Path, folder: Path, bits: float, seed: int, device: str) -> Path:
    """Plan for the budget, on the calibration's text; the report lies beside the plan."""
    output = folder / "plan.json"
    if not output.exists():
        found = plan(source, Options(bits=bits, seed=seed, device=device), output)
        (folder / "report.json").write_text(json.dumps(found))
    return output


def measured(row: str, source: Path, folder: Path, held: Text, asked: Any) -> dict[str, Any]:
    """Pack one row and evaluate it; from the folder when that was done before."""
    kept = folder / f"{row}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    name, _, how = row.rpartition(", ")
    if name == PLAN:
        path = planned(source, folder, asked.bits, asked.seed, asked.device)
        options = PackOptions("plan", plan=str(path), rounding=how, device=asked.device)
    else:
        chosen = UNIFORM[name](how)
        options = PackOptions(**{**chosen.__dict__, "device": asked.device})
    place = folder / f"packed {row}"
    packed = pack(source, options, Target(place, overwrite=True)).output
    report = evaluate(prepare(packed, text=held, device=asked.device))
    shutil.rmtree(place)
    text = report["perplexity"]
    found = {
        "bits": report["bits_per_weight"],
        "excess_nll": text["excess_nll"],
        "stderr": text["excess_nll_stderr"],
    }
    kept.write_text(json.dumps(found))
    return found


def table(folder: Path, runs: int) -> tuple[dict[str, Any], str]:
    """What is known so far: one line per row, mean and spread over the runs."""
    data, lines = {}, []
    for row in ROWS:
        files = [folder / f"run{n}" / f"{row}.json" for n in range(runs)]
        found = [json.loads(path.read_text()) for path in files if path.exists()]
        if not found:
            continue
        data[row] = found
        losses = [one["excess_nll"] for one in found]
        name, _, how = row.rpartition(", ")
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        bits = mean(one["bits"] for one in found)
        each = " ".join(f"{loss:.4f}" for loss in losses)
        lines.append((name, how, f"{bits:.3f}", f"{mean(losses):.4f}", spread, each))
    heads = ("scheme", "rounding", "bits/weight", "excess nats/token", "sd over runs", "each run")
    return data, console.table(heads, lines)


def main() -> None:
    """Parse the command line, fill the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--data", action="append", help="calibration text; repeatable")
    parser.add_argument("--held", help="text to evaluate on; default: the test split of --data")
    parser.add_argument("--bits", type=float, default=4.75)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", help=f"of {'; '.join(ROWS)}; several: with semicolons")
    parser.add_argument("--runs", help="numbers of runs, with commas; none: only the table")
    parser.add_argument("--only-plan", action="store_true", help="calibrate and plan, pack nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path("plans"))
    asked = parser.parse_args()

    data = asked.data or ["sample"]
    draws = (
        [(one, 0) for one in data] if len(data) > 1 else [(data[0], s) for s in range(asked.seeds)]
    )
    held = Text(asked.held or data[0], asked.windows, None)
    rows = [row.strip() for row in asked.rows.split(";")] if asked.rows else ROWS
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    wanted = list(range(len(draws)))
    if asked.runs is not None:
        wanted = [int(n) for n in asked.runs.split(",") if n]
    for n in wanted:
        folder = asked.output / f"run{n}"
        folder.mkdir(parents=True, exist_ok=True)
        text, asked.seed = draws[n]
        source = calibrated(asked.model, folder, text, asked.seed, asked.device)
        if asked.only_plan:
            planned(source, folder, asked.bits, asked.seed, asked.device)
            continue
        for row in rows:
            found = measured(row, source, folder, held, asked)
            console.note(f"run {n}, {row}: {found['bits']:.3f} bits {found['excess_nll']:+.4f}")
    found, text = table(asked.output, len(draws))
    (asked.output / "table.json").write_text(json.dumps(found, indent=1))
    print(text)


if __name__ == "__main__":
    main()
