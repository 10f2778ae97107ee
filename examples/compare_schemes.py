"""Pack calibrated checkpoints in many ways and compare what each costs and loses.

    quantkit calibrate model/ --data wikitext --seed 0 -o model-calibrated
    python examples/compare_schemes.py model-calibrated --data wikitext

packs one model in every way of the table SCHEMES below, runs each packed checkpoint, and prints
true bits per weight (of the files), excess loss over the unquantized model on the same tokens, and
which schemes nothing beats at their size. More calibrated checkpoints of the same model (other
seeds) give the mean over calibrations and their spread:

    python examples/compare_schemes.py seed0 seed1 seed2 --data wikitext --jobs 8 -o schemes

writes `schemes.json`, `schemes.md` and `schemes.png` (needs matplotlib), and keeps the unquantized
model's losses in `schemes.safetensors`. Rows that are in the JSON already are not made again, so an
interrupted run continues. On one GPU, processes that learn stand in each other's way: `--jobs 1` is
fastest there. `--peers FILE` adds results of other
tools, which examples/peer_losses.py measures where they are installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scheme_table import HEADER, cells, lines_of, markdown, plot

from quantkit import console
from quantkit.errors import QuantkitError
from quantkit.pack.job import PackOptions

Row = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """The tokens every scheme is judged on."""

    data: str
    windows: int | None
    seq_len: int | None


def osc(group: int, rounding: str, mlp_out: str | None = None) -> PackOptions:
    """The paper's scheme, mlp_out in MXFP8 unless said otherwise."""
    return PackOptions("osc", group=group, rounding=rounding, mlp_out=mlp_out)


def recipe(name: str, rounding: str, branch_bits: float | None = None) -> PackOptions:
    """A 4-bit recipe with another rounding, or another size of its branch."""
    return PackOptions(name, rounding=rounding, branch_bits=branch_bits)


def residual(name: str, rounding: str, branch_bits: float) -> PackOptions:
    """A recipe whose branch is the quantized residual of its channels, in the same GEMM."""
    return replace(recipe(name, rounding, branch_bits), branch="residual")


def fitted(name: str, branch_bits: float | None = None) -> PackOptions:
    """A recipe with balanced channels, aiming at the unquantized model's outputs."""
    return replace(recipe(name, "gptq", branch_bits), balance=True, asymmetric=True)


SCHEMES: dict[str, PackOptions] = {
    "mxfp4, floor": PackOptions("mxfp4", scale_rule="floor"),
    "mxfp4, rceil": PackOptions("mxfp4", scale_rule="rceil"),
    "mxfp4, even": PackOptions("mxfp4"),
    "mxfp4, search": PackOptions("mxfp4", rounding="search"),
    "mxfp4, gptq": PackOptions("mxfp4", rounding="gptq"),
    "w4a4-plain, rtn": recipe("w4a4-plain", "rtn"),
    "w4a4-plain, gptq": recipe("w4a4-plain", "gptq"),
    "w4a4-plain, gptq, asymmetric": fitted("w4a4-plain"),
    "w4a4-plain, learned": recipe("w4a4-plain", "learned"),
    "w4a4-mx, branch of 0.25 bits, rtn": recipe("w4a4-mx", "rtn", 0.25),
    "w4a4-mx, branch of 0.25 bits, gptq": recipe("w4a4-mx", "gptq", 0.25),
    "w4a4-mx, branch of 0.25 bits, gptq, balanced, asymmetric": fitted("w4a4-mx", 0.25),
    "w4a4-mx, branch of 0.25 bits, learned": recipe("w4a4-mx", "learned", 0.25),
    "w4a4-mx, branch of 0.5 bits, rtn": recipe("w4a4-mx", "rtn", 0.5),
    "w4a4-mx, branch of 0.5 bits, gptq": recipe("w4a4-mx", "gptq", 0.5),
    "w4a4-mx, branch of 0.5 bits, gptq, balanced, asymmetric": fitted("w4a4-mx", 0.5),
    "w4a4-mx, branch of 0.5 bits, learned": recipe("w4a4-mx", "learned", 0.5),
    "nvfp4, rtn": PackOptions("nvfp4"),
    "nvfp4, gptq": PackOptions("nvfp4", rounding="gptq"),
    "nvfp4, gptq, four over six": PackOptions("nvfp4", rounding="gptq", four_over_six=True),
    "w4a4, branch of 0.25 bits, rtn": recipe("w4a4", "rtn", 0.25),
    "w4a4, branch of 0.25 bits, gptq": recipe("w4a4", "gptq", 0.25),
    "w4a4, branch of 0.25 bits, gptq, balanced, asymmetric": fitted("w4a4", 0.25),
    "w4a4, branch of 0.25 bits, learned": recipe("w4a4", "learned", 0.25),
    "w4a4, branch of 1.2 bits, rtn": recipe("w4a4", "rtn", 1.2),
    "w4a4, branch of 1.2 bits, gptq": recipe("w4a4", "gptq", 1.2),
    "w4a4, branch of 1.2 bits, gptq, balanced, asymmetric": fitted("w4a4", 1.2),
    "w4a4, branch of 1.2 bits, learned": recipe("w4a4", "learned", 1.2),
    "w4a4, residual of 0.25 bits, rtn": residual("w4a4", "rtn", 0.25),
    "w4a4, residual of 0.25 bits, gptq": residual("w4a4", "gptq", 0.25),
    "w4a4, residual of 1.2 bits, gptq": residual("w4a4", "gptq", 1.2),
    "w4a4-mx, residual of 0.25 bits, rtn": residual("w4a4-mx", "rtn", 0.25),
    "w4a4-mx, residual of 0.25 bits, gptq": residual("w4a4-mx", "gptq", 0.25),
    "w4a4-mx, residual of 0.25 bits, no Hadamard, gptq": replace(
        residual("w4a4-mx", "gptq", 0.25), hadamard=0
    ),
    **{
        f"osc, groups of {group}, {rounding}": osc(group, rounding)
        for group in (32, 64, 128)
        for rounding in ("rtn", "gptq")
    },
    **{
        f"osc, 4-bit mlp_out, groups of {group}, {rounding}": osc(group, rounding, "mxfp4")
        for group in (32, 64, 128)
        for rounding in ("rtn", "gptq")
    },
    **{
        f"{name}, rtn, head and embedding in {fmt}": replace(options, head=fmt, embedding=fmt)
        for fmt in ("mxfp8", "mxfp4")
        for name, options in (
            ("mxfp4", PackOptions("mxfp4")),
            ("w4a4, branch of 0.25 bits", recipe("w4a4", "rtn", 0.25)),
            ("osc, 4-bit mlp_out, groups of 32", osc(32, "rtn", "mxfp4")),
        )
    },
}


def needs_calibration(options: PackOptions) -> bool:
    """Whether a scheme's result depends on the calibration (or is one for all of them)."""
    return options.scheme != "mxfp4" or options.rounding not in (None, "rtn")


def measure(
    checkpoint: str, seed: int, options: PackOptions, text: Text, exact: Path, work: str
) -> Row:
    """Pack one checkpoint in one way, run it, and throw it away; in a process of its own."""
    from safetensors.torch import load_file
    from transformers.utils import logging

    import quantkit
    from quantkit.checkpoint.inspect import inspect
    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.checkpoint.step import Target
    from quantkit.evaluate.perplexity import compare, negative_log_likelihood, summarise
    from quantkit.kernels import dispatch
    from quantkit.pack.pack import pack

    console.OUTPUT.quiet = True
    logging.disable_progress_bar()
    options, batch = replace(options, seed=seed), 8 if options.device.startswith("cuda") else 1
    with tempfile.TemporaryDirectory(dir=work) as folder:
        start = time.monotonic()
        packed = pack(checkpoint, options, Target(Path(folder) / "packed")).output
        seconds = time.monotonic() - start
        dispatch.forget()
        model = quantkit.load(str(packed), device=options.device)
        nll = negative_log_likelihood(model, tokens_of(text, checkpoint).ids, batch=batch)
        excess = compare(load_file(exact)["nll"], nll)
        return {
            "bits": inspect(open_checkpoint(packed))["bits_per_weight"],
            "excess": excess.mean,
            "stderr": excess.stderr,
            "perplexity": summarise(nll).perplexity,
            "rounded_on": options.samples or "as many windows as pack takes by itself",
            "pack_seconds": round(seconds, 1),
            "kernels": sorted(dispatch.summary()),
        }


def tokens_of(text: Text, checkpoint: str) -> Any:
    """The tokens to be judged on."""
    from quantkit.data.tokens import load_tokens

    return load_tokens(
        text.data, Path(checkpoint), samples=text.windows, seq_len=text.seq_len, held_out=True
    )


def exact_losses(checkpoint: str, text: Text, device: str, file: Path, known: Row | None) -> Row:
    """The unquantized model's row of the table; its losses are left in `file` for the workers."""
    from safetensors.torch import save_file

    import quantkit
    from quantkit.evaluate.perplexity import negative_log_likelihood, summarise

    tokens = tokens_of(text, checkpoint)
    if known is not None:
        if known["digest"] != tokens.digest:
            raise SystemExit("the table holds results on other tokens: give another -o")
        if file.exists():
            return known
    model = quantkit.load(checkpoint, device=device)
    nll = negative_log_likelihood(model, tokens.ids, batch=8 if device != "cpu" else 1)
    save_file({"nll": nll}, file)
    return {
        "bits": 8.0 * next(model.parameters()).element_size(),
        "perplexity": summarise(nll).perplexity,
        "text": tokens.description,
        "digest": tokens.digest,
    }


def fill(
    table: Row,
    file: Path,
    checkpoints: Sequence[str],
    text: Text,
    device: str,
    samples: int | None,
    jobs: int,
    word: str,
) -> None:
    """Make the rows that `table` lacks, several at a time, writing `file` after each."""
    todo = [
        (name, seed, replace(options, device=device, samples=samples))
        for seed in range(len(checkpoints))
        for name, options in SCHEMES.items()
        if word in name
        and (not seed or needs_calibration(options))
        and str(seed) not in table["schemes"].get(name, {})
    ]
    todo.sort(key=lambda one: (one[1], one[2].rounding != "learned"))  # the longest first
    if not todo:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    exact = file.with_suffix(".safetensors").resolve()
    table["original"] = exact_losses(checkpoints[0], text, device, exact, table.get("original"))
    with tempfile.TemporaryDirectory(dir=exact.parent) as work:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        waiting = {
            pool.submit(measure, checkpoints[seed], seed, options, text, exact, work): (name, seed)
            for name, seed, options in todo
        }
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                name, seed = waiting[future]
                said = f"{done}/{len(todo)} {name}, calibration {seed}"
                try:
                    row = future.result()
                except QuantkitError as error:
                    print(f"{said}: {error}", file=sys.stderr)
                    continue
                table["schemes"].setdefault(name, {})[str(seed)] = row
                write(file, table)
                print(f"{said}: {row['bits']:.3f} bits, {row['excess']:+.4f}", file=sys.stderr)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


def write(file: Path, table: Row) -> None:
    """Replace the JSON file by a whole one."""
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(file)


def read_peers(file: Path | None, table: Row) -> list[Row]:
    """Peers' results on the same tokens; those on others are named and left out."""
    if file is None:
        return []
    peers, digest = json.loads(file.read_text()), table.get("original", {}).get("digest")
    for peer in peers:
        if digest and peer["digest"] != digest:
            print(f"{peer['name']}: measured on other tokens, left out", file=sys.stderr)
    return [peer for peer in peers if not digest or peer["digest"] == digest]


def main() -> None:
    """Parse the command line, fill the table, write and print it."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="calibrated checkpoints of one model")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, help="windows to round on; default: calibration's")
    parser.add_argument("--jobs", type=int, default=1, help="schemes measured at the same time")
    parser.add_argument("--only", default="", help="make only rows whose name has this in it")
    parser.add_argument("--peers", type=Path, help="results of examples/peer_losses.py")
    parser.add_argument("-o", "--output", default="schemes", help="without .json, .md, .png")
    options = parser.parse_args()
    from quantkit.evaluate.models import choose_device

    file = Path(f"{options.output}.json")
    table: Row = json.loads(file.read_text()) if file.exists() else {"schemes": {}}
    text = Text(options.data, options.windows, options.seq_len)
    device = choose_device(options.device)
    interrupted = False
    try:
        fill(
            table,
            file,
            options.checkpoints,
            text,
            device,
            options.samples,
            options.jobs,
            options.only,
        )
    except KeyboardInterrupt:
        interrupted = True
    lines = lines_of(table, list(SCHEMES), read_peers(options.peers, table))
    rows = cells(table, lines)
    file.with_suffix(".md").write_text(markdown(rows))
    plot(lines, file.with_suffix(".png"))
    print(console.table(HEADER, rows))
    sys.exit(130 if interrupted else 0)


if __name__ == "__main__":
    main()
