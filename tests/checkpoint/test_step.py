"""The frame of every step: input, output, resume, record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target, begin_step
from quantkit.commands.common import parse_size
from quantkit.errors import UsageError
from tests.checkpoint.folders import sharded


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path / "model")
    monkeypatch.chdir(tmp_path)


def test_steps_chain_without_naming_their_input() -> None:
    for verb, suffix, checkpoint in [("calibrate", "calibrated", "model"), ("pack", "osc", None)]:
        with begin_step(
            verb, checkpoint, options={"n": 1}, suffix=suffix, target=Target(), seed=5
        ) as step:
            step.writer.keep_rest()
            step.notes["sites"] = 4
            output = step.finish(plan_digest="abc")
    assert output == Path("model-osc")
    manifest = open_checkpoint(output).manifest
    assert manifest is not None
    assert [s.verb for s in manifest.steps] == ["calibrate", "pack"]
    last = manifest.steps[-1]
    assert (last.options, last.seed, last.plan_digest) == ({"n": 1}, 5, "abc")
    assert last.notes["sites"] == 4
    assert last.input_digest == open_checkpoint("model").weights_digest()
    assert last.peak_memory_bytes > 2**20
    assert last.versions["torch"] == torch.__version__


def test_an_interrupted_step_says_that_it_continues(capsys: pytest.CaptureFixture[str]) -> None:
    def run(stop: bool) -> None:
        with begin_step("x", "model", options={}, suffix="new", target=Target()) as step:
            if not step.writer.done("a"):
                step.writer.write("a", torch.ones(8))
            if stop:
                raise KeyboardInterrupt
            step.writer.keep_rest()
            step.finish()

    with pytest.raises(KeyboardInterrupt):
        run(stop=True)
    run(stop=False)
    assert "continuing an interrupted run: 1 tensors are done" in capsys.readouterr().err
    with pytest.raises(UsageError, match="exists already"):
        run(stop=False)


def test_other_weights_under_the_same_name_are_another_run() -> None:
    with begin_step("x", "model", options={}, suffix="new", target=Target()) as step:
        step.writer.write("a", torch.ones(8))
    shard = Path("model/model-00001-of-00002.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with (
        pytest.raises(UsageError, match="input was"),
        begin_step("x", "model", options={}, suffix="new", target=Target()),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("1000", 1000), ("2k", 2000), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-1", "5 apples", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)
