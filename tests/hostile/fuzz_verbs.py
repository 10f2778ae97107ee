"""Whole commands on damaged checkpoints: `python -m tests.hostile.fuzz_verbs --cases 2000`.

A tiny model is calibrated, separated, rotated and packed; each case damages one of these folders
(mostly its JSON, which gets further than broken headers do) and gives it to a command. Allowed: any
exit code but with one line and a hint at most. Not allowed: a defect's message, a traceback, no end
in sixty seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit import console
from quantkit.cli import main as quantkit
from tests.hostile.damage import build
from tests.hostile.fuzz import Hang, time_limit, workplace
from tests.tiny import save_tiny

SECONDS = 60

# Folder -> commands that take it.
VERBS: dict[str, list[list[str]]] = {
    "model": [["inspect"], ["pack", "--scheme", "mxfp4"], ["rotate"], ["calibrate", "--data", "T"]],
    "model-calibrated": [
        ["pack", "--scheme", "osc"],
        ["pack", "--scheme", "nvfp4"],
        ["separate-outliers"],
        ["smooth", "--method", "search"],
    ],
    "model-separated": [["pack", "--scheme", "osc"], ["pack", "--dry-run"], ["inspect"]],
    "model-rotated": [
        ["pack", "--scheme", "mxfp4", "--mlp-out", "mxfp4"],
        ["smooth", "--method", "search"],
    ],
    "model-osc": [["inspect"], ["eval", "--data", "T", "--limit", "1", "--seq-len", "16"]],
    "model-mxfp4": [["eval", "--data", "T", "--limit", "1", "--seq-len", "16"]],
}


def run_command(arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of one command, run in this process."""
    errors, code = io.StringIO(), 0
    shown = console.OUTPUT.json, console.OUTPUT.quiet
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            quantkit(arguments)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    console.OUTPUT.json, console.OUTPUT.quiet = shown
    return code, errors.getvalue()


def prepare(place: Path) -> None:
    """Make the good folders, and the tokens `T`."""
    tokens = torch.randint(0, 255, (4, 32), generator=torch.Generator().manual_seed(0))
    save_file({"ids": tokens}, place / "tokens.safetensors")
    save_tiny(place / "model", dtype=torch.bfloat16)
    steps = [
        ["calibrate", "model", "--data", str(place / "tokens.safetensors:ids")],
        ["separate-outliers", "model-calibrated"],
        ["rotate", "model-calibrated"],
        ["pack", "model-separated", "--scheme", "osc"],
        ["pack", "model-calibrated", "--scheme", "mxfp4"],
    ]
    for step in steps:
        code, errors = run_command(step)
        if code:
            raise AssertionError(f"{' '.join(step)}: {errors}")
    missing = [name for name in VERBS if not (place / name).is_dir()]
    if missing:
        raise AssertionError(f"not made: {missing}; there is {sorted(os.listdir(place))}")


def run_case(seed: int, place: Path) -> tuple[str, int]:
    """Damage a folder and run a command on it; returns verb and exit code, raises on a defect."""
    chance = random.Random(seed)
    base = chance.choice(sorted(VERBS))
    command = chance.choice(VERBS[base])
    files = {p.name: p.read_bytes() for p in (place / base).iterdir() if p.is_file()}
    damaged = place / "damaged"
    for leftover in (damaged, place / "result", place / "result.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged.mkdir()
    heads = {n: d for n, d in files.items() if n.endswith(".json") and "tokenizer" not in n}
    victims = heads if chance.random() < 0.7 else files
    build(damaged, place / "outside", victims, chance)
    for name in set(files) - set(victims):
        (damaged / name).write_bytes(files[name])
    arguments = [command[0], str(damaged), *command[1:]]
    arguments = [str(place / "tokens.safetensors:ids") if a == "T" else a for a in arguments]
    if command[0] not in ("inspect", "eval"):
        arguments += ["-o", str(place / "result")]
    with time_limit(SECONDS):
        code, errors = run_command(arguments)
    lines = [line for line in errors.splitlines() if line.startswith(("error:", "hint:"))]
    if "defect of quantkit" in errors or "Traceback" in errors or len(lines) > 2:
        raise AssertionError(f"{' '.join(arguments)}: {errors[-1500:]}")
    if code not in (0, 1, 2, 3):
        raise AssertionError(f"{' '.join(arguments)}: exit code {code}")
    if code in (2, 3) and ((place / "result").exists() or (place / "result.partial").exists()):
        raise AssertionError(f"{' '.join(arguments)}: refused, but left something behind")
    return command[0], code


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A working folder with everything a case needs."""
    before = os.getcwd()
    with workplace() as place:
        os.chdir(place)
        try:
            prepare(place)
            yield place
        finally:
            os.chdir(before)


def run(first: int, cases: int) -> tuple[list[int], Counter[tuple[str, int]]]:
    """Run cases; returns the failed ones and how often each verb ended with each exit code."""
    failed: list[int] = []
    ends: Counter[tuple[str, int]] = Counter()
    with prepared() as place:
        for seed in range(first, first + cases):
            try:
                ends[run_case(seed, place)] += 1
            except (Exception, Hang) as error:
                failed.append(seed)
                print(f"case {seed}: {type(error).__name__} {error}"[:1800], file=sys.stderr)
    return failed, ends


def main() -> int:
    """Run and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    failed, ends = run(options.first, options.cases)
    table = {f"{verb} {code}": count for (verb, code), count in sorted(ends.items())}
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"cases": options.cases, "failed": failed, "seconds": seconds, "ends": table}))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
