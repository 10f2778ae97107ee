"""Fixtures that several folders of tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit import cli, console
from tests import workspace as workspaces
from tests.tiny import calibrate_tiny
from tests.workspace import Done, Shell, Workspace


@pytest.fixture(scope="session")
def finished_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace") / "work"
    folder.mkdir()
    workspaces.build(folder)
    return folder


@pytest.fixture
def workspace(
    finished_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A copy of the finished workspace, entered, with a cache of its own."""
    found = workspaces.copy(finished_workspace, tmp_path / "work")
    monkeypatch.chdir(found.path)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANTKIT_TASKS_DIR", raising=False)
    return found


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Run a command line in this process: its exit code, stdout and stderr."""

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(console, "OUTPUT", console.Output())
        code = 0
        try:
            cli.main(list(arguments))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 2 layers in bfloat16 with statistics; not to be changed."""
    return calibrate_tiny(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps note their output in the working folder: keep that out of the repository."""
    monkeypatch.chdir(tmp_path)
