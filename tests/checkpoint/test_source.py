"""Hub ids, the cache and local folders; no test reaches a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve
from quantkit.errors import InputRejected, QuantkitError
from tests.checkpoint.folders import single


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache holding owner/name, and no network."""
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    repository = hub / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    revision = "0123456789012345678901234567890123456789"
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in single(tmp_path / "made").iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_cached_model_is_found_by_its_id(cache: Path) -> None:
    folder = resolve("owner/name")
    assert folder.resolve() == cache.resolve()
    assert open_checkpoint(folder).read("a").tolist() == list(b"abcd")


def test_a_local_folder_wins(cache: Path, tmp_path: Path) -> None:
    single(tmp_path / "owner" / "name")
    assert resolve("owner/name").resolve() == tmp_path / "owner" / "name"


def test_a_configuration_alone_is_not_a_cached_model(cache: Path) -> None:
    (cache / "model.safetensors").unlink()
    with pytest.raises(QuantkitError, match="not in the Hub cache"):
        resolve("owner/name")


def test_an_unknown_id_without_network_is_one_line(cache: Path) -> None:
    with pytest.raises(QuantkitError, match="not in the Hub cache") as caught:
        resolve("owner/other")
    assert "local folder" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["./nothing", "/nothing/here", "nothing", "a/b/c", "a b/c", "no/"])
def test_what_is_no_id_is_a_missing_folder(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputRejected, match="no such folder"):
        resolve(text)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputRejected, match="not a folder"):
        resolve(tmp_path / "file")
