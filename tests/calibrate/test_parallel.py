"""Two processes must measure what one measures, and notice when the other one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.calibrate import layerwise
from quantkit.calibrate.hidden import HiddenStates
from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.calibrate.parallel import Ranks
from quantkit.calibrate.store import FILE
from quantkit.checkpoint.step import Target
from quantkit.errors import QuantkitError
from quantkit.model.block import BlockRunner
from tests.ranks import free_port, run_ranks
from tests.tiny import VOCAB, save_tiny

SAMPLES, SEQ = 11, 1024  # three batches, the last one smaller


def start(rank: int, size: int, port: int, *more: str) -> subprocess.Popen[str]:
    """Start one process as a launcher would: the environment is all it gives."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sizes = ["--samples", str(SAMPLES), "--device", "cpu"]
    arguments = ["calibrate", "model", "--data", "tokens.safetensors:ids", *sizes, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "quantkit", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, VOCAB, (SAMPLES, SEQ), generator=generator)
    save_file({"ids": ids}, "tokens.safetensors")
    return tmp_path / "model"


def calibrate_over(size: int, output: str) -> None:
    options = Options(data="tokens.safetensors:ids", samples=SAMPLES, device="cpu")
    codes = run_ranks(size, lambda: calibrate("model", options, Target(output=Path(output))))
    assert codes == [0] * size


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_processes_equal_one(model: Path, family: str) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    save_tiny(model, family, torch.bfloat16, max_position_embeddings=SEQ, **more)
    calibrate_over(1, "one")
    calibrate_over(2, "two")
    one, two = load_file(Path("one", FILE)), load_file(Path("two", FILE))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        other = two[name]
        if tensor.dtype == torch.int64 or name.endswith(("tail", "absmax")):
            assert torch.equal(tensor, other), name
        else:
            site, statistic = name.split("/")
            size = tensor.abs()
            if statistic == "mean":
                size = (one[f"{site}/energy"] / one[f"{site}/count"]).sqrt()
            elif statistic == "m3":
                size = (one[f"{site}/m2"] * one[f"{site}/m4"]).sqrt()
            assert bool(((tensor - other).abs() <= 1e-6 * size).all()), name


def test_a_dead_process_ends_the_run(model: Path) -> None:
    """The other process says so in one line, and the run can be continued by one alone."""
    save_tiny(model, "llama", max_position_embeddings=SEQ, num_hidden_layers=8)
    port = free_port()
    first, second = (start(rank, 2, port, "-o", "out") for rank in range(2))
    while not Path("out.partial/scratch/boundary.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, said = first.communicate(timeout=60)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert first.returncode == 1, said
    assert len(errors) == 1
    assert "another process of this run has ended" in errors[0]
    assert "Traceback" not in said
    assert not Path("out").exists()
    alone = start(0, 1, port, "-o", "out")
    _, said = alone.communicate()
    assert alone.returncode == 0, said
    assert "continuing behind block" in said


def test_a_run_of_which_one_process_spills_continues(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file goes on to later blocks at every block; the others must keep theirs as often."""
    save_tiny(model, "llama", torch.bfloat16, max_position_embeddings=SEQ, num_hidden_layers=6)
    monkeypatch.setitem(layerwise.BATCH_TOKENS, "cpu", 4 * SEQ)  # three batches: one and two
    between = 5 * SEQ * 64 * 2  # bytes of hidden states: more than the first one's four samples
    options = Options("tokens.safetensors:ids", SAMPLES, device="cpu", activation_memory=between)
    real, keep = BlockRunner.load, HiddenStates.keep

    def dear(self: HiddenStates) -> None:
        keep(self)
        self._cost = 1e9  # never again worth the time, unless they spill

    def dying(self: BlockRunner, i: int, *more: Any) -> Any:
        if i == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i, *more)

    def run() -> None:
        with suppress(QuantkitError):
            calibrate("model", options, Target(Path("out")))

    monkeypatch.setattr(HiddenStates, "keep", dear)
    monkeypatch.setattr(BlockRunner, "load", dying)
    assert run_ranks(2, run) == [0, -signal.SIGKILL]
    monkeypatch.setattr(BlockRunner, "load", real)
    assert run_ranks(2, run) == [0, 0]
    calibrate("model", options, Target(Path("whole")))
    out, whole = load_file(Path("out", FILE)), load_file(Path("whole", FILE))
    for name in (n for n in whole if n.endswith(("/count", "/absmax"))):
        assert torch.equal(out[name], whole[name]), name


def test_first_process_refuses_for_all(model: Path) -> None:
    save_tiny(model, "llama", max_position_embeddings=SEQ)
    Path("out").mkdir()
    port = free_port()
    both = [start(rank, 2, port, "-o", "out") for rank in range(2)]
    for process in both:
        _, said = process.communicate(timeout=60)
        assert process.returncode in (1, 2), said
        assert "Traceback" not in said


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_everything_once(size: int) -> None:
    for items in range(20):
        shares = [i for rank in range(size) for i in Ranks(rank, size).share(items)]
        assert shares == list(range(items))
