"""Packing spread over processes: the bytes are those of one process."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibrate import layerwise
from quantkit.checkpoint.step import Target
from quantkit.errors import QuantkitError
from quantkit.model.block import BlockRunner
from quantkit.pack import plain
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from tests.hostile.test_killed_verbs import timeless
from tests.ranks import run_ranks
from tests.tiny import calibrate_tiny


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_tiny(tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.parametrize(
    "options",
    [PackOptions("osc", mlp_out="mxfp4"), PackOptions("nvfp4", rounding="search")],
    ids=["osc", "nvfp4 search"],
)
def test_two_or_three_processes_equal_one(
    calibrated: Path, tmp_path: Path, options: PackOptions
) -> None:
    for size in (1, 2, 3):
        (tmp_path / str(size)).mkdir()
        target = Target(tmp_path / str(size) / "out")
        assert run_ranks(size, lambda t=target: pack(calibrated, options, t)) == [0] * size
    one, *more = (timeless(tmp_path / str(size) / "out") for size in (1, 2, 3))
    assert all(other == one for other in more)


def test_a_dead_process_ends_the_run_and_what_is_done_is_kept(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, target = PackOptions("mxfp4"), Target(tmp_path / "out")
    real, count = plain.packed_group, 0

    def dying(*arguments: object, **named: object) -> object:
        nonlocal count
        count += 1
        if os.environ["RANK"] == "1" and count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)  # type: ignore[arg-type]

    def work() -> None:
        try:
            pack(calibrated, options, target)
        except QuantkitError as error:
            os._exit(1 if "another process of this run has ended" in error.message else 9)

    monkeypatch.setattr(plain, "packed_group", dying)
    assert run_ranks(2, work) == [1, -signal.SIGKILL]
    monkeypatch.setattr(plain, "packed_group", real)
    assert not target.output.exists()  # type: ignore[union-attr]
    pack(calibrated, options, Target(tmp_path / "whole"))
    assert any((tmp_path / "out.partial" / "data").iterdir())
    pack(calibrated, options, target)
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples a batch: four of them."""
    monkeypatch.setitem(layerwise.BATCH_TOKENS, "cpu", 128)


ON_TEXT = PackOptions("w4a4", asymmetric=True)


@pytest.mark.usefixtures("small_batches")
def test_rounding_on_text_over_two_or_three_processes_equals_one(
    calibrated: Path, tmp_path: Path
) -> None:
    for size in (1, 2, 3):
        (tmp_path / str(size)).mkdir()
        target = Target(tmp_path / str(size) / "out")
        assert run_ranks(size, lambda t=target: pack(calibrated, ON_TEXT, t)) == [0] * size
    one, *more = (timeless(tmp_path / str(size) / "out") for size in (1, 2, 3))
    assert all(other == one for other in more)


@pytest.mark.parametrize("batch", [128, 2048], ids=["four batches", "one batch"])
def test_a_process_that_dies_in_the_second_block_loses_only_that(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """The same command continues, and so does one process alone: with the whole run's bytes."""
    monkeypatch.setitem(layerwise.BATCH_TOKENS, "cpu", batch)  # one: the first process has none
    target, real = Target(tmp_path / "out"), BlockRunner.load

    def dying(self: BlockRunner, i: int, *more: Any) -> Any:
        if os.environ["RANK"] == "1" and i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i, *more)

    def work() -> None:
        try:
            pack(calibrated, ON_TEXT, target)
        except QuantkitError as error:
            os._exit(1 if "another process of this run has ended" in error.message else 9)

    monkeypatch.setattr(BlockRunner, "load", dying)
    assert run_ranks(2, work) == [1, -signal.SIGKILL]
    loaded = tmp_path / "loaded"

    def noting(self: BlockRunner, i: int, *more: Any) -> Any:
        with open(loaded, "a") as file:
            file.write(str(i))
        return real(self, i, *more)

    monkeypatch.setattr(BlockRunner, "load", noting)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "alone.partial")
    assert run_ranks(2, lambda: pack(calibrated, ON_TEXT, target)) == [0, 0]
    assert set(loaded.read_text()) == {"1"}
    pack(calibrated, ON_TEXT, Target(tmp_path / "alone"))
    pack(calibrated, ON_TEXT, Target(tmp_path / "whole"))
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    assert timeless(tmp_path / "alone") == timeless(tmp_path / "whole")


def test_learned_rounding_says_that_one_process_does_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calibrated = calibrate_tiny(tmp_path, num_hidden_layers=1)
    options = PackOptions("mxfp4", rounding="learned", steps=1)
    capfd.readouterr()
    assert run_ranks(2, lambda: pack(calibrated, options, Target(tmp_path / "out"))) == [0, 0]
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning:")] == [
        "warning: --rounding learned is one process's work: 1 of 2 processes have nothing to do"
    ]
