"""The unquantized original of a checkpoint is found through the manifest, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.ancestry import origin
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target, begin_step
from tests.checkpoint.folders import sharded


def step(verb: str, source: Path, output: Path, fill: float | None = None) -> None:
    with begin_step(verb, source, options={}, suffix=verb, target=Target(output)) as running:
        if fill is not None:
            running.writer.write("layer.0.0", torch.full((8, 16), fill))
        running.writer.keep_rest()
        running.finish()


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sharded(tmp_path / "a" / "model")
    step("calibrate", Path("a/model"), tmp_path / "b")
    step("smooth", Path("b"), tmp_path / "c", 1.0)
    step("pack", Path("c"), tmp_path / "d", 2.0)
    return tmp_path


def found(folder: Path) -> Path | None:
    checkpoint = origin(open_checkpoint(folder))
    return checkpoint and checkpoint.path


def test_the_oldest_one_that_is_there(chain: Path) -> None:
    assert found(chain / "d") == chain / "a" / "model"
    shutil.rmtree(chain / "a")
    assert found(chain / "d") == chain / "b"
    shutil.rmtree(chain / "b")
    assert found(chain / "d") == chain / "c"
    shutil.rmtree(chain / "c")
    assert found(chain / "d") is None


def test_other_weights_in_its_place_are_not_it(chain: Path) -> None:
    shutil.rmtree(chain / "a" / "model")
    step("other", chain / "c", chain / "a" / "model", 3.0)
    assert found(chain / "d") == chain / "b"


def test_moving_the_whole_tree_keeps_it(
    chain: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = tmp_path_factory.mktemp("elsewhere") / "all"
    shutil.move(chain, moved)
    assert found(moved / "d") == moved / "a" / "model"


def test_a_model_nobody_changed_has_no_origin(chain: Path) -> None:
    assert found(chain / "a" / "model") is None
