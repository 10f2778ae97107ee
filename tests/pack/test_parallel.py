"""Packing spread over processes: the bytes are those of one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from quantkit.checkpoint.step import Target
from quantkit.errors import QuantkitError
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


def test_rounding_on_text_is_done_by_the_first(calibrated: Path, tmp_path: Path) -> None:
    options, target = PackOptions("mxfp4", rounding="gptq"), Target(tmp_path / "out")
    assert run_ranks(2, lambda: pack(calibrated, options, target)) == [0, 0]
    assert (tmp_path / "out").is_dir()
