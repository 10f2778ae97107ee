"""Every step killed at random instants and repeated: the output is an undisturbed run's.

`QUANTKIT_KILLS=30 pytest tests/hostile/test_killed_verbs.py` kills each step thirty times.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.reader import open_checkpoint
from tests.checkpoint.folders import contents
from tests.hostile.fuzz_verbs import run_command
from tests.hostile.test_killed import in_child
from tests.tiny import save_tiny

KILLS = int(os.environ.get("QUANTKIT_KILLS", "2"))  # of each step

STEPS: dict[str, list[str]] = {
    "calibrated": ["calibrate", "model", "--data", "tokens.safetensors:ids"],
    "smoothed": ["smooth", "model-calibrated", "--method", "search"],
    "learned": ["smooth", "model-calibrated", "--method", "learned", "--steps", "3"],
    "rotated": ["rotate", "model-calibrated", "--kind", "random-hadamard"],
    "separated": ["separate-outliers", "model-calibrated"],
    "packed": ["pack", "model-calibrated", "--scheme", "osc", "--mlp-out", "mxfp4"],
    "ends": ["pack", "model-calibrated", "--head", "mxfp8", "--embedding", "mxfp4"],
    "searched": ["pack", "model-calibrated", "--scheme", "nvfp4", "--rounding", "search"],
    "compensated": ["pack", "model-calibrated", "--scheme", "w4a4", "--rounding", "gptq"],
    "exported": ["export", "model-packed", "--fold-outliers", "--windows", "0"],
}
MADE_FROM = {name: command[1] for name, command in STEPS.items()}


def timeless(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, with what a manifest says of times and memory left out."""
    files = contents(folder)
    manifest = json.loads(files["quantkit.json"])
    for step in manifest["steps"]:
        del step["seconds"], step["peak_memory_bytes"]
    files["quantkit.json"] = json.dumps(manifest).encode()
    return files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its calibrated form in a folder that is copied for every series of kills."""
    import transformers  # noqa: F401 - so that the children need not

    torch.set_num_threads(1)  # a fork would lose the threads of a pool
    place = tmp_path_factory.mktemp("verbs")
    tokens = torch.randint(0, 255, (8, 64), generator=torch.Generator().manual_seed(0))
    save_file({"ids": tokens}, place / "tokens.safetensors")
    save_tiny(place / "model", dtype=torch.bfloat16)
    return place


def run_in(place: Path, arguments: list[str], kill_after: float | None = None) -> int:
    """Run a command with `place` as the working folder in a child; its exit status."""

    def work() -> None:
        os.chdir(place)
        code, errors = run_command(arguments)
        if code:
            (place / "errors").write_text(errors)
        os._exit(code)

    return in_child(work, kill_after)


def made(place: Path, name: str) -> None:
    """Make an output of `STEPS` in `place`, and before it what it is made from, unless there."""
    if name in STEPS and not (place / f"model-{name}").exists():
        made(place, MADE_FROM[name].removeprefix("model-"))
        status = run_in(place, [*STEPS[name], "-o", f"model-{name}"])
        assert status == 0, (place / "errors").read_text()


def copies(place: Path, name: str, *kinds: str) -> list[Path]:
    """Folders alike in which step `name` can be run."""
    made(place, MADE_FROM[name].removeprefix("model-"))
    found = [place.with_name(f"{place.name}-{name}-{kind}") for kind in kinds]
    for other in found:
        shutil.copytree(place, other, ignore=shutil.ignore_patterns(f"model-{name}"))
    return found


@pytest.mark.parametrize("name", STEPS)
def test_killed_and_repeated(place: Path, name: str) -> None:
    command = [*STEPS[name], "-o", f"model-{name}"]
    whole, killed = copies(place, name, "whole", "killed")
    started = time.monotonic()
    assert run_in(whole, command) == 0, (whole / "errors").read_text()
    duration = time.monotonic() - started
    chance = random.Random(name)
    kills = 0
    while kills < KILLS:
        status = run_in(killed, command, kill_after=chance.uniform(0, duration))
        if status == -signal.SIGKILL:
            kills += 1
        if (killed / f"model-{name}").exists():
            assert timeless(killed / f"model-{name}") == timeless(whole / f"model-{name}")
            shutil.rmtree(killed / f"model-{name}")
            shutil.rmtree(killed / f"model-{name}.partial", ignore_errors=True)
    if not (killed / f"model-{name}").exists():
        assert run_in(killed, command) == 0, (killed / "errors").read_text()
    assert timeless(killed / f"model-{name}") == timeless(whole / f"model-{name}")
    assert not (killed / f"model-{name}.partial").exists()
    open_checkpoint(killed / f"model-{name}")


FAULTS = {"preadv": errno.EIO, "pwrite": errno.ENOSPC, "write": errno.ENOSPC, "fsync": errno.ENOSPC}


def run_faulty(place: Path, arguments: list[str], call: str, after: int) -> tuple[int, int]:
    """Run a command whose system call `call` fails from the n-th on; exit status, calls made."""
    calls = place / "calls"

    def work() -> None:
        real, made_so_far = getattr(os, call), 0

        def failing(*given: object) -> object:
            nonlocal made_so_far
            made_so_far += 1
            if made_so_far > after:
                raise OSError(FAULTS[call], os.strerror(FAULTS[call]))
            return real(*given)

        setattr(os, call, failing)
        os.chdir(place)
        code, errors = run_command(arguments)
        (place / "errors").write_text(errors)
        calls.write_text(str(made_so_far))
        os._exit(code)

    return in_child(work), int(calls.read_text())


@pytest.mark.parametrize("name", STEPS)
def test_a_failing_disk_ends_a_step_in_one_line_and_it_continues(place: Path, name: str) -> None:
    command = [*STEPS[name], "-o", f"model-{name}"]
    whole, failing = copies(place, name, "sound", "failing")
    chance = random.Random(name)
    for call in FAULTS:
        status, calls = run_faulty(whole, [*command, "--overwrite"], call, 10**9)
        assert status == 0, (whole / "errors").read_text()
        if not calls:
            continue
        status, _ = run_faulty(failing, command, call, chance.randrange(calls))
        said = (failing / "errors").read_text()
        if status == 0:  # the last calls may be for what only repeats the record of the output
            assert (failing / f"model-{name}").exists(), said
        else:
            assert status == 1, said
            assert "defect" not in said, said
            assert "Traceback" not in said
            assert sum(line.startswith("error:") for line in said.splitlines()) == 1
        if not (failing / f"model-{name}").exists():
            assert run_in(failing, command) == 0, (failing / "errors").read_text()
        assert timeless(failing / f"model-{name}") == timeless(whole / f"model-{name}")
        shutil.rmtree(failing / f"model-{name}")
