"""The frame every verb that writes a checkpoint shares.

    with begin_step("smooth", checkpoint, options={"alpha": 0.5}, suffix="smoothed",
                    target=target) as step:
        for name in step.source.names():
            ...
            step.writer.write(name, changed)      # or .keep(name) / .drop(name) / .keep_rest()
        step.writer.write_file("config.json", data)
        step.notes["layers"] = 30
        output = step.finish(statistics_digest=digest)

`begin_step` finds the input (a path, a Hub id, or None: the last output of this folder), opens it,
chooses and checks the output, makes the fingerprint under which an interrupted run is continued
(verb, options, seed, digest of the input, versions), and opens the writer. `finish` renames the
output into place with the step in its manifest and remembers it for the next step. Leaving the
block without `finish`, by an exception or not, keeps what is done for the same command to continue.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantkit import __version__, console
from quantkit.checkpoint import workspace
from quantkit.checkpoint.claim import check_output
from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve
from quantkit.checkpoint.writer import DEFAULT_SHARD_SIZE, CheckpointWriter


@dataclass(frozen=True)
class Target:
    """Where and how to write: what `-o --overwrite --restart --max-shard-size` say."""

    output: Path | None = None
    overwrite: bool = False
    restart: bool = False
    max_shard_size: int = DEFAULT_SHARD_SIZE


@dataclass
class OpenStep:
    """A running step: its input, its output, and what is recorded of it."""

    verb: str
    source: Checkpoint
    writer: CheckpointWriter
    options: dict[str, Any]
    seed: int | None
    input_digest: str
    started: float
    notes: dict[str, Any] = field(default_factory=dict)

    def finish(
        self, *, statistics_digest: str | None = None, plan_digest: str | None = None
    ) -> Path:
        """Rename the finished output into place; returns its path."""
        step = Step(
            verb=self.verb,
            options=self.options,
            seed=self.seed,
            versions=versions(),
            input_digest=self.input_digest,
            statistics_digest=statistics_digest,
            plan_digest=plan_digest,
            seconds=round(time.monotonic() - self.started, 3),
            peak_memory_bytes=peak_memory(),
            notes=self.notes,
        )
        output = self.writer.finish(step)
        workspace.record_output(Path.cwd(), output)
        return output


def open_source(checkpoint: str | Path | None) -> Checkpoint:
    """Open the checkpoint given, or the last output of the working folder (named on stderr)."""
    if checkpoint is None:
        last = workspace.last_output(Path.cwd())
        console.note(f"checkpoint: {last} (the last output of this folder)")
        return open_checkpoint(last)
    return open_checkpoint(resolve(checkpoint))


def output_of(source: Checkpoint, suffix: str, target: Target) -> Path:
    """The output folder: the one given, or beside the input with `suffix`; checked for use."""
    output = target.output or workspace.default_output(source.path, suffix)
    check_output(output, source.path, target.overwrite)
    return output


@contextmanager
def begin_step(
    verb: str,
    checkpoint: str | Path | Checkpoint | None,
    *,
    options: Mapping[str, Any],
    suffix: str,
    target: Target,
    seed: int | None = None,
    also: Mapping[str, Any] | None = None,
) -> Iterator[OpenStep]:
    """Open input and output of a step; see the module's text.

    `options` go into the manifest and the fingerprint, `also` into the fingerprint only (digests of
    data, statistics or plan).
    """
    started = time.monotonic()
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_source(checkpoint)
    output = output_of(source, suffix, target)
    digest = source.weights_digest()
    fingerprint = {
        "verb": verb,
        "options": dict(options),
        "seed": seed,
        "input": digest,
        "versions": versions(),
        **(also or {}),
    }
    with CheckpointWriter(
        output,
        source,
        fingerprint=fingerprint,
        overwrite=target.overwrite,
        restart=target.restart,
        max_shard_size=target.max_shard_size,
    ) as writer:
        if writer.finished:
            console.note(f"continuing an interrupted run: {writer.finished} tensors are done")
        step = OpenStep(verb, source, writer, dict(options), seed, digest, started)
        # Where the input lies, seen from the output: both may move together.
        step.notes["input"] = os.path.relpath(source.path.resolve(), output.resolve())
        yield step


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    found = {"quantkit": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """The most bytes of memory this process held at once (resident set)."""
    try:
        # ru_maxrss would count the process we were started from; this counts from our own start.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
