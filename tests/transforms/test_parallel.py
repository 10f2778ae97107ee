"""Smoothing spread over processes: the output is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.step import Target
from quantkit.transforms.decide import Method
from quantkit.transforms.learned import Training
from quantkit.transforms.smooth import SmoothOptions, smooth
from tests.hostile.test_killed_verbs import timeless
from tests.ranks import run_ranks
from tests.tiny import calibrate_tiny


@pytest.mark.parametrize(
    "method",
    [Method("learned", training=Training(steps=6, trial=2)), Method("max", check=False)],
    ids=["learned", "max"],
)
def test_two_or_three_processes_equal_one(tmp_path: Path, method: Method) -> None:
    calibrated = calibrate_tiny(tmp_path)
    options = SmoothOptions(method, samples=8, device="cpu")
    for size in (1, 2, 3):
        (tmp_path / str(size)).mkdir()
        target = Target(tmp_path / str(size) / "out")
        assert run_ranks(size, lambda t=target: smooth(calibrated, options, t)) == [0] * size
    one, *more = (timeless(tmp_path / str(size) / "out") for size in (1, 2, 3))
    assert "smoothing.json" in one
    assert all(other == one for other in more)
