"""Put an output folder together: link or copy shards, take harmless files along."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantkit import console
from quantkit.checkpoint import manifest as manifests
from quantkit.checkpoint.reader import INDEX
from quantkit.checkpoint.safety import CODE, OTHER_WEIGHTS, PICKLES, inside
from quantkit.errors import InputRejected

# Belong to the weights they were computed from: taken along only while these stay the same.
DERIVED = ("statistics.safetensors", "outliers.json")


def place(real: Path, target: Path) -> None:
    """Give the file `real` the further name `target`: a hard link, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def copy_tree(source: Path, target: Path) -> None:
    """Copy every file below `source` to the same place below `target`, in place of what is there.

    What is there may be a hard link to another checkpoint's file: it is replaced, not written to.
    """
    for folder, _, files in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for file in files:
            (here / file).unlink(missing_ok=True)
            shutil.copyfile(Path(folder, file), here / file)


def carry_files(source: Path, target: Path, *, skip: set[str], statistics: bool) -> None:
    """Copy tokenizer, configs, templates, licence and the like from `source` to `target`.

    Left behind: weights in any format, pickles, hidden files, executable code (Python files of a
    checkpoint are never run by quantkit, and what they describe may not fit the output), links that
    leave the folder. `statistics`: whether files derived from the weights still hold.
    """
    left: list[str] = []
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder).relative_to(source)
        for file in sorted(files):
            name = str(here / file)
            if name in skip or name in {INDEX, manifests.FILE} or file.startswith("."):
                continue
            if name in DERIVED:
                if not statistics:
                    continue
            elif file.endswith((*PICKLES, *OTHER_WEIGHTS, ".safetensors", ".index.json")):
                continue
            if file.endswith(CODE):
                left.append(name)
                continue
            try:
                real = inside(source, name)
            except InputRejected as error:
                console.warn(f"left behind: {error.message}")
                continue
            if not real.is_file():
                continue
            (target / here).mkdir(parents=True, exist_ok=True)
            if name in DERIVED:
                place(real, target / name)  # as large as a shard, and as little changed in place
            else:
                shutil.copyfile(real, target / name)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        console.note(f"left behind: code is not taken along ({left[0]}{more})")
