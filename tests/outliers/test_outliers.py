"""Choosing channels: the criteria by definition, the plan file, the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantkit.calibrate.accumulators import Hits, SiteAccumulator
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.formats import mxfp4
from quantkit.model.sites import KINDS
from quantkit.outliers import score
from quantkit.outliers.plan import FILE, Plan, load_plan, parse
from quantkit.outliers.separate import separate_outliers

pytestmark = pytest.mark.usefixtures("elsewhere")


def mode_by_definition(x: torch.Tensor, group: int) -> list[int]:
    """OSC, Algorithm 1, token by token and group by group."""
    threshold = 5 * x.abs().double().mean()
    chosen = []
    for start in range(0, x.shape[1], group):
        votes: dict[int, int] = {}
        for token in x[:, start : start + group].abs():
            if token.max() > threshold:
                winner = int(token.argmax())
                votes[winner] = votes.get(winner, 0) + 1
        if votes:
            chosen.append(start + min(votes, key=lambda j: (-votes[j], j)))
    return chosen


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("width", [128, 96])
def test_mode_is_algorithm_1(group: int, width: int) -> None:
    generator = torch.Generator().manual_seed(group)
    x = torch.randn(300, width, generator=generator)
    x[:, 7] *= 9
    x[::2, 40] *= 12
    x[:, 64:] *= 0.05  # groups that no token exceeds the threshold in
    accumulator = SiteAccumulator.empty("site", width, torch.float32, 4)
    accumulator.update(x)
    hits = Hits.of(accumulator.maxima, 5 * accumulator.magnitude.mean())
    channels = score.mode_of_argmax(hits.hits[group], group)
    assert channels.tolist() == mode_by_definition(x, group)


def test_ties_go_to_the_first_channel_and_empty_groups_are_bypassed() -> None:
    values = torch.zeros(96)
    values[[5, 9]] = 2.0
    values[70] = 1.0
    assert score.best_of_groups(values, 32).tolist() == [5, 70]
    assert score.best_of_groups(values, 64).tolist() == [5, 70]
    assert score.best_of_groups(torch.zeros(40), 32).tolist() == []


def test_error_reduction_by_trying_every_channel() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 64, generator=generator)
    x[:, 10] *= 20
    gain = score.error_reduction(x)

    def error(values: torch.Tensor) -> torch.Tensor:
        return (mxfp4.fake_quantize(values) - values).double().square().sum()

    for channel in range(64):
        without = x.clone()
        without[:, channel] = 0
        expected = error(x) - error(without)
        torch.testing.assert_close(gain[channel], expected, rtol=1e-4, atol=1e-3)
    assert score.best_of_groups(gain, 32)[0] == 10


def test_plan_round_trip() -> None:
    sites = {"layers.0.attn_in": (3, 40), "layers.0.mlp_out": ()}
    plan = Plan(sites, 32, "mode", "d" * 64, "s" * 64, {"layers.0.attn_in": 0.5})
    text = plan.encode().decode()
    assert parse(json.loads(text), Path(FILE)) == plan
    assert '"layers.0.attn_in": [3, 40],\n' in text, "one line a site: made to be read and diffed"


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9},
        {"sites": []},
        {"sites": {"a": [3, 1]}},
        {"sites": {"a": [1, 1]}},
        {"sites": {"a": [-1, 2]}},
        {"sites": {"a": [True]}},
        {"sites": {"a": "1,2"}},
        {"group": "32"},
        {"weights_digest": None},
        {"density": {"a": "high"}},
        {"threshold": None},
    ],
)
def test_hostile_plans_are_rejected(change: dict[str, object]) -> None:
    data = json.loads(Plan({"a": (1,)}, 32, "mode", "d").encode())
    with pytest.raises(InputRejected, match="not a plan"):
        parse(data | change, Path(FILE))


@pytest.mark.parametrize("criterion", score.CRITERIA)
def test_the_step_writes_a_plan_beside_the_same_weights(
    calibrated: Path, tmp_path: Path, criterion: str
) -> None:
    done = separate_outliers(calibrated, Target(tmp_path / "out"), criterion=criterion)
    source, output = open_checkpoint(calibrated), open_checkpoint(done.output)
    assert output.weights_digest() == source.weights_digest()
    assert (done.output / "statistics.safetensors").exists()
    shard = done.output / "model.safetensors"
    assert shard.stat().st_ino == (calibrated / "model.safetensors").stat().st_ino
    plan = load_plan(output)
    assert plan == done.plan
    assert plan.criterion == criterion
    for channels in plan.sites.values():
        groups = [c // 32 for c in channels]
        assert len(set(groups)) == len(groups), "at most one channel of a group"
    kinds = done.by_kind()
    assert set(kinds) == set(KINDS)
    assert all(kind in done.as_text() for kind in KINDS)
    assert 0 < kinds["mlp_out"]["density"] <= 1


def test_unknown_choices_are_usage_errors(calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--group 48"):
        separate_outliers(calibrated, Target(tmp_path / "out"), group=48)
    with pytest.raises(UsageError, match="--criterion best"):
        separate_outliers(calibrated, Target(tmp_path / "out"), criterion="best")


def test_a_kind_without_outliers_prints_no_density(calibrated: Path, tmp_path: Path) -> None:
    done = separate_outliers(calibrated, Target(tmp_path / "out"))
    for key in [key for key in done.plan.density if key.endswith("mlp_out")]:
        del done.plan.density[key]  # type: ignore[attr-defined]
    assert done.by_kind()["mlp_out"]["tier"] == "none"
    assert done.as_text()
