"""A folder as a user has it: a tiny model through the usual steps, text and tasks beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.evaluate.local_tasks import write_arc, write_mmlu
from tests.tiny import save_tiny


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Shell = Callable[..., Done]


@dataclass(frozen=True)
class Workspace:
    """The folder."""

    path: Path

    def only(self, *names: str) -> None:
        """Remove everything but `names`."""
        for entry in self.path.iterdir():
            if entry.name not in names:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def build(folder: Path) -> None:
    """Model, stand-ins for wikitext and the tasks, and the outputs of calibrate and pack."""
    from quantkit.calibrate.layerwise import Options, calibrate
    from quantkit.checkpoint.step import Target
    from quantkit.pack.job import PackOptions
    from quantkit.pack.pack import pack

    save_tiny(folder / "model", max_position_embeddings=1024)
    text = folder / "wikitext"
    text.mkdir()
    (text / "train.txt").write_text(" = Ducks = \n\n Ducks are birds of many waters . \n" * 3000)
    (text / "test.txt").write_text(" = Geese = \n\n Geese are larger birds than ducks . \n" * 600)
    write_mmlu(write_arc(folder / "tasks", questions=6), per_subject=1)
    before = Path.cwd()
    os.chdir(folder)
    try:
        calibrate(
            "model", Options("sample", samples=8, seq_len=64), Target(Path("model-calibrated"))
        )
        pack("model-calibrated", PackOptions("osc"), Target(Path("model-osc")))
    finally:
        os.chdir(before)


def copy(source: Path, target: Path) -> Workspace:
    """A copy to work in; files are linked, which is safe because nothing changes one in place."""
    shutil.copytree(source, target, copy_function=os.link)
    return Workspace(target)
