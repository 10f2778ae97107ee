"""Every step killed at random instants and repeated: the output is an undisturbed run's."""

from __future__ import annotations

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
    "smoothed": ["smooth", "model-calibrated"],
    "rotated": ["rotate", "model-calibrated"],
    "separated": ["separate-outliers", "model-calibrated"],
    "packed": ["pack", "model-calibrated", "--scheme", "osc", "--mlp-out", "mxfp4"],
    "searched": ["pack", "model-calibrated", "--scheme", "nvfp4", "--scale-rule", "mse"],
}


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


@pytest.mark.parametrize("name", STEPS)
def test_killed_and_repeated(place: Path, name: str) -> None:
    if name != "calibrated" and not (place / "model-calibrated").exists():
        assert run_in(place, STEPS["calibrated"]) == 0, (place / "errors").read_text()
    command = [*STEPS[name], "-o", f"model-{name}"]
    places = [place.with_name(f"{place.name}-{name}-{kind}") for kind in ("whole", "killed")]
    for other in places:
        shutil.copytree(place, other, ignore=shutil.ignore_patterns(f"model-{name}"))
    whole, killed = places
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
