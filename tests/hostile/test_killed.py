"""kill -9 at any instant, then the same command: the output is the one of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from tests.checkpoint.folders import contents, sharded

# Every call by which a run changes the disk.
CALLS = ("open", "write", "fsync", "ftruncate", "link", "rename", "replace", "unlink", "mkdir")


def step(source_folder: Path, output: Path, pause: float = 0.0, overwrite: bool = False) -> None:
    """A step with everything in it: linked, partly kept and new shards, odd sizes, side files."""
    source = open_checkpoint(source_folder)
    with CheckpointWriter(
        output, source, fingerprint={"n": 1}, max_shard_size=1500, overwrite=overwrite
    ) as writer:
        for name in source.names():
            if name.startswith("layer.0"):
                writer.keep(name)
            elif name.endswith("0"):
                writer.drop(name)
                if not writer.done(f"{name}.packed"):
                    time.sleep(pause)
                    packed = torch.full((8, 9), 3, dtype=torch.uint8)
                    scale = {f"{name}.scale": packed[:3], f"{name}.global": torch.tensor(2.0)}
                    writer.write_group({f"{name}.packed": packed, **scale})
                writer.write(f"{name}.more", torch.ones(7))
        state = writer.scratch / "state"
        if not state.exists():
            state.write_text("half")
        writer.write_file("outliers.json", b"{}")
        writer.write_file("config.json", b'{"model_type": "llama"}')
        writer.keep_rest()
        writer.finish(Step("pack", {"n": 1}))


def in_child(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a process of its own; returns its exit status, negative when killed.

    The child shares what is imported, so that dozens of runs cost no more than their own work.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(work: Callable[[], None], call_number: int) -> Callable[[], None]:
    """`work`, killed just before its n-th call that changes the disk."""

    def run() -> None:
        left = call_number

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    return run


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_any_call_that_changes_the_disk(tmp_path: Path, overwrite: bool) -> None:
    folder = sharded(tmp_path / "in", shards=3, per_shard=2)
    before = contents(folder)
    step(folder, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    old = {"precious": b"old"}
    for number in range(2000):
        place = tmp_path / f"{number}"
        place.mkdir()
        out = place / "out"
        if overwrite:
            out.mkdir()
            (out / "precious").write_bytes(b"old")

        def run(out: Path = out) -> None:
            step(folder, out, overwrite=overwrite)

        status = in_child(dying(run, number))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if overwrite:
            partial = place / "out.partial" / "replaced"
            kept = contents(out) if out.exists() else contents(partial)
            assert kept in (old, expected)
        elif out.exists():
            assert contents(out) == expected
        if not out.exists() or overwrite:
            assert in_child(run) == 0
        assert contents(out) == expected
        # What a kill left after the output was whole is cleared by the next run, if there is one.
        assert {p.name for p in place.iterdir()} <= {"out", "out.partial"}
    else:
        pytest.fail("the step never got through")
    assert number > 60
    assert contents(folder) == before


def test_killed_at_random_instants_again_and_again(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "in", shards=4, per_shard=4)
    started = time.monotonic()
    step(folder, tmp_path / "whole", pause=0.01)
    duration = time.monotonic() - started
    expected = contents(tmp_path / "whole")
    chance = random.Random(0)
    kills = runs = 0
    while kills < 30:
        out = tmp_path / f"out{runs}"
        while not out.exists():
            status = in_child(
                lambda out=out: step(folder, out, pause=0.01),  # type: ignore[misc]
                kill_after=chance.uniform(0, duration),
            )
            kills += status == -signal.SIGKILL
        assert contents(out) == expected
        runs += 1
