"""Plans beside uniform schemes with as many bits, over several calibrations of one model.

    quantkit calibrate model/ --data wikitext --seed 0 -o seed0
    quantkit calibrate model/ --data wikitext --seed 1 -o seed1
    python examples/plan_table.py seed0 seed1 --data wikitext --bits 4.75 -o plans

plans each calibrated checkpoint for the budget, packs the plan and the uniform schemes, and
evaluates all on the same held-out text. Each row and the plans are kept in the output folder: an
interrupted run continues, and `--rows` and `--runs` make a part of the table. Prints the table;
`table.json` holds every number. With `--together` the rows rounded to nearest are simulated in one
pass over the blocks, as `quantkit diagnose` does it, which is several times as fast as packing and
running each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quantkit import console
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.data.tokens import load_tokens
from quantkit.diagnose.packing import rounder
from quantkit.diagnose.sets import bits_of
from quantkit.diagnose.sweep import Arrangement, sweep
from quantkit.diagnose.switches import PLAIN
from quantkit.evaluate.models import choose_device
from quantkit.evaluate.perplexity import compare
from quantkit.evaluate.run import Text, evaluate, prepare
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.pack.job import PackOptions
from quantkit.pack.job import prepare as prepare_job
from quantkit.pack.pack import pack
from quantkit.plan.run import Options, plan

UNIFORM = {
    "nvfp4": PackOptions("nvfp4"),
    "nvfp4 + fp8 branch": PackOptions("w4a4", rounding="rtn"),
    "osc, mlp_out in 4 bits": PackOptions("osc", group=32, mlp_out="mxfp4"),
    "osc": PackOptions("osc", group=32),
}
PLAN = "plan"
ROUNDINGS = ("rtn", "gptq")
ROWS = [f"{name}, {how}" for name in (PLAN, *UNIFORM) for how in ROUNDINGS]


def planned(checkpoint: str, folder: Path, asked: argparse.Namespace) -> Path:
    """Plan for the budget, on the calibration's text; the report lies beside the plan."""
    output = folder / "plan.json"
    if not output.exists():
        options = Options(
            bits=asked.bits,
            data=asked.plan_data,
            samples=asked.samples,
            windows=asked.trials,
            device=asked.device,
        )
        report = plan(checkpoint, options, output)
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    return output


def measured(row: str, checkpoint: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Pack one row and evaluate it."""
    options = options_of(row, checkpoint, folder, asked)
    text = Text(asked.data, asked.windows, None)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        place = Path(work) / "packed"
        pack(checkpoint, options, Target(place))
        report = evaluate(prepare(place, source=checkpoint, text=text, device=asked.device))
    found = report["perplexity"]
    return {
        "bits": report["bits_per_weight"],
        "excess_nll": found["excess_nll"],
        "stderr": found["excess_nll_stderr"],
        "text": found["digest"],
        "windows": found["windows"],
    }


def together(
    rows: list[str], checkpoint: str, folder: Path, asked: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All rows in one pass over the blocks: the packed arithmetic, nothing written."""
    source = open_checkpoint(checkpoint)
    layout = describe(source.config, source.tensors)
    options = {row: options_of(row, checkpoint, folder, asked) for row in rows}
    jobs = {row: prepare_job(source, chosen) for row, chosen in options.items()}
    tokens = load_tokens(asked.data, source.path, samples=asked.windows, held_out=True)
    runner = BlockRunner(source, layout, device=choose_device(asked.device))
    runner.keep_head = True
    arrangements: dict[str, Arrangement] = {"plain": lambda site: PLAIN}
    arrangements |= {row: partial(lambda name, site: name, row) for row in rows}
    losses = sweep(runner, tokens.ids, arrangements, rounder(jobs), label="schemes").losses
    found = {}
    for row, job in jobs.items():
        excess = compare(losses["plain"], losses[row])
        found[row] = {
            "bits": round(bits_of(layout, job), 4),
            "excess_nll": excess.mean,
            "stderr": excess.stderr,
            "text": tokens.digest,
            "windows": len(tokens.ids),
        }
    return found


def options_of(row: str, checkpoint: str, folder: Path, asked: argparse.Namespace) -> PackOptions:
    """How a row is packed."""
    name, _, how = row.rpartition(", ")
    if name == PLAN:
        options = PackOptions("plan", plan=str(planned(checkpoint, folder, asked).resolve()))
    else:
        options = UNIFORM[name]
    return replace(options, rounding=how, device=asked.device)


def lines(rows: dict[str, list[dict[str, Any]]]) -> str:
    """One line per row: mean and spread over the calibrations."""
    cells = []
    for row, found in rows.items():
        name, _, how = row.rpartition(", ")
        losses = [one["excess_nll"] for one in found]
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else "-"
        bits = mean(one["bits"] for one in found)
        each = " ".join(f"{loss:.4f}" for loss in losses)
        cells.append((name, how, f"{bits:.3f}", f"{mean(losses):.4f}", spread, each))
    heads = ("scheme", "rounding", "bits/weight", "excess nats/token", "spread", "each calibration")
    return console.table(heads, cells)


def main() -> None:
    """Parse the command line, fill the table, print it."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="calibrated checkpoints of one model")
    parser.add_argument("--data", default="sample", help="text to evaluate on")
    parser.add_argument("--windows", type=int, default=16, help="of that text")
    parser.add_argument("--bits", type=float, default=4.75)
    parser.add_argument("--samples", type=int, default=4, help="as for `quantkit plan`")
    parser.add_argument("--trials", type=int, default=8, help="`quantkit plan --windows`")
    parser.add_argument("--plan-data", help="text to plan on; default: the calibration's")
    parser.add_argument("--rows", default=";".join(ROWS), help=f"of {'; '.join(ROWS)}")
    parser.add_argument(
        "--runs", help="numbers of the checkpoints to do, with commas; default: all"
    )
    parser.add_argument("--together", action="store_true", help="simulate what rounds to nearest")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("plans"))
    asked = parser.parse_args()
    wanted = [row.strip() for row in asked.rows.split(";") if row.strip()]
    if unknown := [row for row in wanted if row not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    numbers = [*range(len(asked.checkpoints))]
    todo = numbers if asked.runs is None else [int(n) for n in asked.runs.split(",")]

    folders = [asked.output / f"calibration {n}" for n in numbers]
    for n in todo:
        folders[n].mkdir(parents=True, exist_ok=True)
        missing = [row for row in wanted if not (folders[n] / f"{row}.json").exists()]
        nearest = [row for row in missing if row.endswith(", rtn")]
        if asked.together and nearest:
            simulated = together(nearest, asked.checkpoints[n], folders[n], asked)
            for row, found in simulated.items():
                (folders[n] / f"{row}.json").write_text(json.dumps(found))
        for row in wanted:
            file = folders[n] / f"{row}.json"
            if not file.exists():
                found = measured(row, asked.checkpoints[n], folders[n], asked)
                file.write_text(json.dumps(found))
                console.note(f"{n}: {row}: {found['bits']:.3f} bits, {found['excess_nll']:+.4f}")
    rows = {}
    for row in ROWS:
        files = [folder / f"{row}.json" for folder in folders]
        if known := [json.loads(file.read_text()) for file in files if file.exists()]:
            rows[row] = known
    (asked.output / "table.json").write_text(json.dumps(rows, indent=1))
    print(lines(rows))


if __name__ == "__main__":
    main()
