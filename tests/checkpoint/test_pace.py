"""Rates of this machine, for forecasts."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint.pace import digest_seconds, hash_rate, running, write_rate
from quantkit.checkpoint.reader import open_checkpoint
from tests.checkpoint.folders import sharded


def test_a_digest_that_is_known_costs_nothing(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in", shards=2, per_shard=2))
    assert digest_seconds(source) > 0
    source.weights_digest()
    assert digest_seconds(source) == 0


def test_writing_for_trial_leaves_nothing(tmp_path: Path) -> None:
    assert write_rate(tmp_path / "not" / "there") > 0
    assert list(tmp_path.iterdir()) == []
    assert hash_rate() > 0
    assert running() > 0
