"""Pickled weights become safetensors; pickled anything else is refused and never runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.convert import convert
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pickled(folder: Path, state: object, config: str = "{}", **options: bool) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_arrive(tmp_path: Path, zipped: bool) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(4, 3).T}
    folder = pickled(tmp_path / "m", state, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(convert(folder, Target()))
    assert checkpoint.path.name == "m-safetensors"
    assert set(checkpoint.names()) == set(state)
    for name, value in state.items():
        assert torch.equal(checkpoint.read(name), value)


def test_an_index_of_pickles(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m", {"a": torch.ones(2)})
    torch.save({"b": torch.zeros(2)}, folder / "second.bin")
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "second.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(convert(folder, Target())).names()) == {"a", "b"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_once(tmp_path: Path, tied: bool) -> None:
    weight = torch.randn(4, 4)
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    folder = pickled(tmp_path / "m", state, json.dumps({"tie_word_embeddings": tied}))
    names = set(open_checkpoint(convert(folder, Target())).names())
    assert names == ({"model.embed_tokens.weight"} if tied else set(state))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("state", [{"a": Evil()}, Evil(), [torch.ones(1)], {"a": 3}], ids=str)
def test_anything_but_tensors_is_refused_and_does_not_run(tmp_path: Path, state: object) -> None:
    folder = pickled(tmp_path / "m", state)
    with pytest.raises(InputRejected, match="not a plain dictionary of tensors"):
        convert(folder, Target())
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "m-safetensors").exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage" * 100, b"PK\3\4" + bytes(100)], ids=len)
def test_a_damaged_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = pickled(tmp_path / "m", {})
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(InputRejected):
        convert(folder, Target())


def test_safetensors_need_no_conversion(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m", {})
    (folder / "model.safetensors").touch()
    with pytest.raises(UsageError, match="already"):
        convert(folder, Target())


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m", {})
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputRejected, match=r"no pytorch_model\.bin"):
        convert(folder, Target())
