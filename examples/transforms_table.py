"""What smoothing and rotation are worth: perplexity and excess loss of every combination.

    quantkit calibrate model/ --data wikitext -o model-calibrated
    python examples/transforms_table.py model-calibrated --data wikitext --held wikitext

runs the steps of the command line, checkpoint to checkpoint, for every row of TRANSFORMS and every
column of SCHEMES: smooth, calibrate again where the statistics could not follow, separate-outliers,
rotate, pack; then it evaluates the packed model beside the unquantized one. Writes transforms.json
and transforms.md. What was measured already is not measured again, and an interrupted smoothing
continues; delete the output folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit import console
from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.checkpoint.step import Target
from quantkit.evaluate.perplexity import compare, negative_log_likelihood, summarise
from quantkit.model.sites import KINDS
from quantkit.outliers.separate import separate_outliers
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.transforms.decide import Method
from quantkit.transforms.learned import Training
from quantkit.transforms.rotate import RotateOptions, rotate_checkpoint
from quantkit.transforms.smooth import SmoothOptions, smooth


@dataclass(frozen=True)
class Transform:
    """A row: scales by `method`, a global rotation, an online block Hadamard of `block`."""

    method: Method | None = None
    glob: bool = False
    block: int | None = None


MAX = Method("max", check=False)
QUANTILE = Method("quantile", check=False)
SEARCH, LEARNED = Method("search"), Method("learned")

TRANSFORMS = {
    "nothing": Transform(),
    "smooth max": Transform(MAX),
    "smooth quantile": Transform(QUANTILE),
    "smooth search": Transform(SEARCH),
    "smooth learned": Transform(LEARNED),
    "block 32": Transform(block=32),
    "global R1 + R4": Transform(glob=True),
    "smooth max + block 32": Transform(MAX, block=32),
    "smooth search + block 32": Transform(SEARCH, block=32),
    "smooth learned + block 32": Transform(LEARNED, block=32),
}


@dataclass(frozen=True)
class Scheme:
    """A column. Scales that are fitted to a rounding are fitted under the rule `even`."""

    name: str
    rule: str = "even"
    group: int = 32


SCHEMES = {
    "mxfp4 floor": Scheme("mxfp4", "floor"),
    "mxfp4": Scheme("mxfp4"),
    "osc floor": Scheme("osc", "floor"),
    "osc": Scheme("osc"),
    "osc of 64": Scheme("osc", group=64),
}


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    checkpoint: str
    data: str
    held: str
    windows: int
    seq_len: int | None
    samples: int
    training: Training
    device: str
    output: Path

    @property
    def work(self) -> Path:
        """The folder of the checkpoints in between."""
        return self.output / "work"


def made(path: Path) -> bool:
    """Whether a step's output is whole (it is renamed when it is)."""
    return path.is_dir()


def prepared_name(transform: Transform, scheme: Scheme) -> str | None:
    """The folder of the checkpoint with changed weights; None where they stay as they are."""
    osc = "-osc" if scheme.name == "osc" else ""
    if transform.glob:
        return "global" + osc
    if transform.method is None:
        return None
    if transform.method.name in ("max", "quantile"):
        return transform.method.name + osc
    return f"{transform.method.name}-{transform.block or 'none'}{osc}"


def prepare(transform: Transform, scheme: Scheme, setting: Setting) -> str:
    """Smooth or rotate globally, with statistics that separate-outliers can use; its folder."""
    quiet()
    name = prepared_name(transform, scheme)
    assert name is not None
    output, osc = setting.work / name, scheme.name == "osc"
    if made(output):
        return name
    # A rotation and a rule that runs no tokens lose the counts of group maxima.
    again = osc and (transform.method is None or not transform.method.check)
    changed = setting.work / f"{name}-weights" if again else output
    if not made(changed) and transform.glob:
        rotation = RotateOptions("random-hadamard", parts=("r1", "r4"))
        rotate_checkpoint(setting.checkpoint, rotation, Target(changed))
    elif not made(changed):
        assert transform.method is not None
        method = replace(transform.method, training=setting.training)
        # An 8-bit site has little to gain and much to cost.
        kinds = tuple(k for k in KINDS if not (osc and k == "mlp_out" and method.check))
        smoothing = SmoothOptions(
            method=method,
            sites=kinds,
            scheme=scheme.name,
            hadamard=str(transform.block or "none"),
            data=setting.data,
            samples=setting.samples,
            seq_len=setting.seq_len,
            device=setting.device,
        )
        smooth(setting.checkpoint, smoothing, Target(changed))
    if again:
        options = Options(setting.data, setting.samples, setting.seq_len, device=setting.device)
        calibrate(changed, options, Target(output))
    return name


def measure(transform: Transform, scheme: Scheme, setting: Setting) -> dict[str, Any]:
    """Separate, rotate blocks, pack and evaluate; what is made on the way is thrown away."""
    import torch

    import quantkit
    from quantkit.checkpoint.inspect import inspect
    from quantkit.checkpoint.reader import open_checkpoint

    quiet()
    name = prepared_name(transform, scheme)
    source = Path(setting.checkpoint) if name is None else setting.work / name
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        work = Path(folder)
        if scheme.name == "osc":
            separate_outliers(source, Target(work / "planned"), group=scheme.group)
            source = work / "planned"
        if transform.block:
            options = RotateOptions("block", block=transform.block)
            source = rotate_checkpoint(source, options, Target(work / "rotated")).output
        packing = PackOptions(scheme.name, scale_rule=scheme.rule)
        packed = pack(source, packing, Target(work / "packed")).output
        model = quantkit.load(str(packed), device=setting.device)
        nll = negative_log_likelihood(model, held_tokens(setting))
        bits = inspect(open_checkpoint(packed))["bits_per_weight"]
    excess = compare(torch.load(setting.work / "exact.pt"), nll)
    return {
        "perplexity": summarise(nll).perplexity,
        "excess": excess.mean,
        "stderr": excess.stderr,
        "bits": bits,
    }


def exact(setting: Setting) -> float:
    """Keep the unquantized model's losses for the workers; its perplexity."""
    import torch

    import quantkit

    path = setting.work / "exact.pt"
    if not path.exists():
        model = quantkit.load(setting.checkpoint, device=setting.device)
        torch.save(negative_log_likelihood(model, held_tokens(setting)), f"{path}.new")
        Path(f"{path}.new").rename(path)
    return summarise(torch.load(path)).perplexity


def held_tokens(setting: Setting) -> Any:
    """The windows that every model is judged on."""
    from quantkit.data.tokens import load_tokens

    return load_tokens(
        setting.held,
        Path(setting.checkpoint),
        samples=setting.windows,
        seq_len=setting.seq_len,
        held_out=True,
    ).ids


def quiet() -> None:
    """No bars and notes from workers."""
    from transformers.utils import logging

    console.OUTPUT.quiet = True
    logging.disable_progress_bar()


def wanted(only: str, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Cells `row | column` to measure, in the order asked for; all of them by default."""
    cells = [(row, column) for column in SCHEMES for row in TRANSFORMS]
    if only:
        asked = [part.partition("|") for part in only.split(",")]
        cells = [
            (row, column)
            for r, _, c in asked
            for row, column in cells
            if row == r.strip() and c.strip() in ("", column)
        ]
    yield from (cell for cell in dict.fromkeys(cells) if "|".join(cell) not in found)


def run(setting: Setting, only: str, jobs: int) -> dict[str, Any]:
    """Measure what is missing, in `jobs` processes; all results by `row|column`."""
    file = setting.output / "transforms.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found["original"] = {"perplexity": exact(setting)}
    waiting: dict[str | None, list[tuple[str, str]]] = {}
    for row, column in wanted(only, found):
        name = prepared_name(TRANSFORMS[row], SCHEMES[column])
        if name is not None and made(setting.work / name):
            name = None
        waiting.setdefault(name, []).append((row, column))
    running: dict[Future[Any], tuple[str, str] | None] = {}
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, spawn) as pool:

        def submit(cells: list[tuple[str, str]]) -> None:
            for row, column in cells:
                arguments = TRANSFORMS[row], SCHEMES[column], setting
                running[pool.submit(measure, *arguments)] = (row, column)

        submit(waiting.pop(None, []))
        for cells in waiting.values():
            row, column = cells[0]
            running[pool.submit(prepare, TRANSFORMS[row], SCHEMES[column], setting)] = None
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, result = running.pop(future), future.result()
                if cell is None:
                    submit(waiting.pop(result))
                    continue
                found["|".join(cell)] = result
                new = file.with_suffix(".new")
                new.write_text(json.dumps(found, indent=1) + "\n")
                new.replace(file)
                print(f"{' | '.join(cell)}: {shown(result)}", file=sys.stderr, flush=True)
    return found


def shown(result: dict[str, Any] | None) -> str:
    """A cell: perplexity and excess loss."""
    if result is None:
        return ""
    return f"{result['perplexity']:.1f} ({result['excess']:+.3f} ± {result['stderr'] or 0:.3f})"


def markdown(found: dict[str, Any]) -> str:
    """The table: perplexity and, in brackets, excess nats per token with its standard error."""
    columns = [c for c in SCHEMES if any(key.endswith(f"|{c}") for key in found)]
    lines = [f"| perplexity (excess nats/token) | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in TRANSFORMS:
        cells = [shown(found.get(f"{row}|{column}")) for column in columns]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append(f"\nUnquantized: {found['original']['perplexity']:.2f}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, write and print the table."""
    parser = argparse.ArgumentParser(description="Compare transforms by the loss they leave.")
    parser.add_argument("checkpoint", help="a calibrated checkpoint")
    parser.add_argument("-o", "--output", type=Path, default=Path("transforms"))
    parser.add_argument("--data", default="wikitext", help="text that scales are fitted on")
    parser.add_argument("--held", default="wikitext", help="text that models are judged on")
    parser.add_argument("--windows", type=int, default=16, help="of held text")
    parser.add_argument("--samples", type=int, default=16, help="windows to fit on")
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--steps", type=int, default=Training().steps, help="of learning, at most")
    parser.add_argument("--batch", type=int, default=Training().batch, help="tokens a step")
    parser.add_argument("--outputs", type=int, default=Training().outputs, help="outputs a step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", default="", help="row|column, ...; a row alone: all its columns")
    options = parser.parse_args()
    from quantkit.evaluate.models import choose_device

    steps, batch = options.steps, options.batch
    setting = Setting(
        options.checkpoint,
        options.data,
        options.held,
        options.windows,
        options.seq_len,
        options.samples,
        Training(steps=steps, trial=min(60, steps // 3), batch=batch, outputs=options.outputs),
        choose_device(options.device),
        options.output,
    )
    setting.work.mkdir(parents=True, exist_ok=True)
    table = markdown(run(setting, options.only, options.jobs))
    (setting.output / "transforms.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
