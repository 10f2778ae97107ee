"""The note of the last output, and the names outputs get."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.workspace import default_output, last_output, record_output
from quantkit.errors import InputRejected, UsageError


def test_the_last_output_is_found_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        record_output(tmp_path, tmp_path / name)
        assert last_output(tmp_path).resolve() == (tmp_path / name).resolve()


def test_a_moved_folder_keeps_its_note(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    record_output(work, work / "out")
    work.rename(tmp_path / "moved")
    assert last_output(tmp_path / "moved").resolve() == tmp_path / "moved" / "out"


def test_no_note_or_no_output_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint given"):
        last_output(tmp_path)
    record_output(tmp_path, tmp_path / "gone")
    with pytest.raises(UsageError, match="is gone"):
        last_output(tmp_path)


@pytest.mark.parametrize("note", ["", "[]", '{"output": 3}', '{"output": "a\\u0000b"}', "\xff"])
def test_a_damaged_note_is_rejected(tmp_path: Path, note: str) -> None:
    (tmp_path / ".quantkit").mkdir()
    (tmp_path / ".quantkit" / "last.json").write_text(note, encoding="latin-1")
    with pytest.raises(InputRejected):
        last_output(tmp_path)


@pytest.mark.parametrize(
    ("source", "suffix", "expected"),
    [
        ("model", "osc", "model-osc"),
        ("model/", "calibrated", "model-calibrated"),
        ("model-calibrated", "osc", "model-osc"),
        ("model-smoothed-calibrated", "rotated", "model-smoothed-rotated"),
        ("models--o--big/snapshots/abc", "osc", "big-osc"),
    ],
)
def test_outputs_lie_beside_their_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, suffix: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_output(Path(source), suffix) == Path(expected)


def test_outputs_of_an_input_elsewhere_lie_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert default_output(tmp_path / "model", "osc") == tmp_path / "model-osc"
