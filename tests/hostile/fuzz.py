"""Mutated checkpoints by the thousand: `python -m tests.hostile.fuzz --cases 100000`.

Each case is a number: it picks a good checkpoint, damages its bytes, its JSON or its folder, and
reads it with everything that reads files of a stranger. Allowed: it is read, or refused in one
line. Not allowed: another exception, ten seconds without an end, a tensor from outside the folder,
a changed file outside, more than 200 MB of memory. Numbers that once failed are in
`fuzz_seeds.txt` and are run first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

from quantkit import console
from quantkit.checkpoint.inspect import as_text, inspect
from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import QuantkitError
from quantkit.model.families import describe
from tests.hostile.damage import bases, build

SEEDS = Path(__file__).with_name("fuzz_seeds.txt")
HANG_SECONDS = 10
MEMORY_BYTES = 200 * 2**20
CANARY = "canary.weight"


# -- what reads them ------------------------------------------------------------------------------


def read_everything(checkpoint: Checkpoint, output: Path) -> None:
    """Use a checkpoint that was opened: read, digest, inspect, copy."""
    if CANARY in checkpoint.tensors:
        raise AssertionError("a tensor from outside the folder was read")
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        if tuple(tensor.shape) != info.shape:
            raise AssertionError(f"{name} has another shape")
        if info.shape and info.shape[0]:
            checkpoint.read_rows(name, 0)
    data = inspect(checkpoint)
    text = as_text(data) + json.dumps(data)
    text.encode()
    if not all(c.isprintable() or c == "\n" for c in text):
        raise AssertionError("control characters are shown")
    with CheckpointWriter(output, checkpoint, fingerprint={}) as writer:
        writer.write("more", torch.zeros(3))
        writer.keep_rest()
        writer.finish(Step("copy"))
    if open_checkpoint(output).weights_digest() == checkpoint.weights_digest():
        raise AssertionError("the copy with a tensor more has the same digest")


def _optional(module: str, function: str) -> Callable[[Checkpoint], object] | None:
    try:
        return getattr(importlib.import_module(module), function, None)
    except ImportError:
        return None


READERS = [
    lambda c: describe(c.config, c.tensors),
    *filter(
        None,
        [
            _optional("quantkit.checkpoint.ancestry", "origin"),
            _optional("quantkit.outliers.plan", "load_plan"),
            _optional("quantkit.calibrate.store", "load_statistics"),
        ],
    ),
]


class Hang(BaseException):
    """A case that did not end in time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def allowed(work: Callable[[], object]) -> bool:
    """Run a reader: True when it succeeded, False when it refused in one line, as it should."""
    try:
        work()
    except QuantkitError as error:
        message = f"{error.message}{error.hint or ''}"
        if not message.isprintable() or len(message) > 2000:
            raise AssertionError(f"not one clean line: {message[:200]!r}") from error
        return False
    return True


def run_case(seed: int, place: Path, good: list[dict[str, bytes]]) -> bool:
    """Build case `seed` below `place` and read it; True when accepted. Raises on a defect."""
    chance = random.Random(seed)
    folder, outside = place / "model", place / "outside"
    for leftover in (folder, place / "copy", place / "copy.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    build(folder, outside, chance.choice(good), chance)
    opened: list[Checkpoint] = []
    with time_limit(HANG_SECONDS):
        if not allowed(lambda: opened.append(open_checkpoint(folder))):
            return False
        checkpoint = opened[0]
        with _pretending_digest(checkpoint, chance):
            for reader in READERS:
                allowed(lambda reader=reader: reader(checkpoint))  # type: ignore[misc]
        allowed(lambda: read_everything(checkpoint, place / "copy"))
        checkpoint.close()
    return True


@contextmanager
def _pretending_digest(checkpoint: Checkpoint, chance: random.Random) -> Iterator[None]:
    """Mostly let plans and statistics pass for those of these weights, to get behind that test."""
    if chance.random() < 0.2:
        yield
        return
    checkpoint.weights_digest = lambda: "d" * 64  # type: ignore[method-assign]
    try:
        yield
    finally:
        del checkpoint.weights_digest  # type: ignore[method-assign]


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder in memory where there is one, with a checkpoint outside that none may read."""
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    place = Path(tempfile.mkdtemp(prefix="quantkit-fuzz-", dir=root))
    quiet, console.OUTPUT.quiet = console.OUTPUT.quiet, True
    warn, console.warn = console.warn, lambda message: None
    try:
        (place / "outside").mkdir()
        (place / "outside" / "model.safetensors").write_bytes(save({CANARY: torch.ones(4)}))
        for name in ("config.json", INDEX, "quantkit.json", "outliers.json"):
            (place / "outside" / name).write_text('{"model_type": "canary"}')
        yield place
    finally:
        console.OUTPUT.quiet, console.warn = quiet, warn
        shutil.rmtree(place)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder, to see whether it was touched."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def memory(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def kept_seeds() -> list[int]:
    """Cases that once failed."""
    lines = SEEDS.read_text().split() if SEEDS.exists() else []
    return [int(line) for line in lines]


def run(first: int, cases: int, report_every: int = 0) -> tuple[list[int], dict[str, float]]:
    """Run the kept cases and `cases` more from number `first`; returns failed ones and figures."""
    good, failed, accepted = bases(), [], 0
    seeds = [*kept_seeds(), *range(first, first + cases)]
    started, slowest = time.monotonic(), 0.0
    with workplace() as place:
        for seed in range(-50, 0):  # what is allocated once is no growth
            run_case(seed, place, good)
        outside, start = snapshot(place / "outside"), memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # let the peak count from here
        for number, seed in enumerate(seeds, 1):
            began = time.monotonic()
            try:
                accepted += run_case(seed, place, good)
            except (Exception, Hang):
                failed.append(seed)
                print(f"case {seed}:", file=sys.stderr)
                print(traceback.format_exc(limit=-4)[-2000:], file=sys.stderr)
            slowest = max(slowest, time.monotonic() - began)
            if report_every and number % report_every == 0:
                print(f"{number} cases, {len(failed)} failed, {time.monotonic() - started:.0f} s")
        if snapshot(place / "outside") != outside:
            raise AssertionError("a file outside the checkpoint was changed")
        extra = {p.name for p in place.iterdir()} - {"model", "outside", "copy", "copy.partial"}
        if extra:
            raise AssertionError(f"something was written beside the output: {extra}")
    figures = {
        "cases": len(seeds),
        "accepted": accepted,
        "failed": len(failed),
        "seconds": round(time.monotonic() - started, 1),
        "slowest_seconds": round(slowest, 3),
        "peak_growth_mb": round((memory("VmHWM") - start) / 2**20, 1),
        "growth_mb": round((memory("VmRSS") - start) / 2**20, 1),
    }
    return failed, figures


def main() -> int:
    """Run, print the figures, keep the numbers of failed cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed, figures = run(options.first, options.cases, report_every=10_000)
    print(json.dumps(figures))
    if failed:
        SEEDS.write_text("".join(f"{s}\n" for s in sorted({*kept_seeds(), *failed})))
    return bool(failed) or figures["peak_growth_mb"] * 2**20 > MEMORY_BYTES


if __name__ == "__main__":
    sys.exit(main())
