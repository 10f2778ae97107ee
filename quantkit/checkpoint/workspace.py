"""`.quantkit/`: the note of the last output written from a folder, so that steps can be chained."""

from __future__ import annotations

import json
import os
from pathlib import Path

from quantkit.checkpoint.safety import read_json
from quantkit.errors import InputRejected, UsageError

FOLDER = ".quantkit"
FILE = "last.json"


def user_cache(name: str) -> Path:
    """The folder `name` of this user's cache: under QUANTKIT_CACHE, or the system's usual place."""
    if root := os.environ.get("QUANTKIT_CACHE"):
        return Path(root).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantkit" / name


def record_output(cwd: Path, path: Path) -> None:
    """Remember `path` as the last output written from `cwd`."""
    folder = cwd / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps({"output": os.path.relpath(path, cwd)}) + "\n")
    temporary.replace(folder / FILE)


def last_output(cwd: Path) -> Path:
    """The last output written from `cwd`; UsageError when there is none or it is gone."""
    note = cwd / FOLDER / FILE
    hint = "name a checkpoint: a folder, or a model of the Hub"
    if not note.exists():
        raise UsageError("no checkpoint given, and no earlier step was run in this folder", hint)
    data = read_json(note)
    output = data.get("output") if isinstance(data, dict) else None
    if not isinstance(output, str) or "\0" in output:
        raise InputRejected(f"{note}: not a note of quantkit", hint)
    path = cwd / output
    if not path.is_dir():
        raise UsageError(f"the last output of this folder, {output}, is gone", hint)
    return path


def default_output(source: Path, suffix: str) -> Path:
    """The output beside the input, with the step's suffix: `model` -> `model-osc`.

    Suffixes of steps that leave the weights alone are replaced: `model-calibrated` -> `model-osc`.
    A model in the Hub cache gets its output in the working folder.
    """
    real = source.resolve()
    if real.parent.name == "snapshots":  # .../models--owner--name/snapshots/REVISION
        name, folder = real.parent.parent.name.split("--")[-1], Path.cwd()
    else:
        name, folder = real.name or "model", real.parent
    for known in REPLACED_SUFFIXES:
        name = name.removesuffix(f"-{known}")
    output = folder / f"{name}-{suffix}"
    return output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output


REPLACED_SUFFIXES = ("calibrated", "separated")
