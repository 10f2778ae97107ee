"""Local task data: folders in the Hub's schema take the place of a task's Hub data set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import InputRejected, UsageError

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
SPLIT_NAMES = {"val": "validation", "valid": "validation", "eval": "test"}
ENVIRONMENT = "QUANTKIT_TASKS_DIR"


def default_folder(given: Path | None) -> Path | None:
    """Where local task data is looked for: `--tasks-dir`, $QUANTKIT_TASKS_DIR, then `./tasks`."""
    if given is None and (named := os.environ.get(ENVIRONMENT)):
        given = Path(named)
    if given is not None:
        if not given.is_dir():
            raise UsageError(f"no such folder of task data: {given}")
        return given
    return Path("tasks") if Path("tasks").is_dir() else None


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Data files of `folder` by split: `test.jsonl`, `test-00000-of-00002.parquet`, ...

    A single file with a name of its own (`questions.jsonl`) is the split "*": whichever one the
    task evaluates on. When a split is there in several formats the first of parquet, jsonl, json,
    csv is taken.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, dict[str, list[Path]]] = {}
    files = sorted(f for f in folder.iterdir() if f.suffix in BUILDERS)
    for file in files:
        split = file.stem.split("-")[0].split(".")[0].lower()
        split = SPLIT_NAMES.get(split, split)
        found.setdefault(split, {}).setdefault(file.suffix, []).append(file)
    known = {"train", "validation", "test", "dev", "auxiliary_train"}
    if found and not known & set(found) and len(files) == 1:
        found = {"*": next(iter(found.values()))}
        known = {"*"}
    order = list(BUILDERS)
    return {
        split: formats[min(formats, key=order.index)]
        for split, formats in found.items()
        if split in known
    }


def candidates(
    folder: Path, task: str, parents: Sequence[str], config: Mapping[str, Any]
) -> list[Path]:
    """Folders where the data of `task` may lie, most specific first.

    `arc_easy/`, then (for members of a group) `mmlu/anatomy/`, then the Hub's own layout
    `allenai/ai2_arc/ARC-Easy/` or `ai2_arc/ARC-Easy/`.
    """
    path, name = str(config.get("dataset_path") or ""), config.get("dataset_name")
    places = [folder / task]
    for parent in parents:
        short = task.removeprefix(f"{parent}_")
        places += [folder / parent / part for part in (short, task, name) if part]
    for hub in (path, path.rpartition("/")[2]):
        if hub:
            places += [folder / hub / str(name)] if name else [folder / hub]
    return places


def subject_rows(
    folder: Path, parents: Sequence[str], subject: str | None, work: Path
) -> dict[str, list[Path]]:
    """Cut one subject out of a group's flat files with a `subject` column (as cais/mmlu `all`).

    Returns its files by split, written under `work`; nothing when there is no such column.
    """
    if not subject:
        return {}
    for parent in parents:
        for place in (folder / parent, folder / parent / "all"):
            files = split_files(place)
            cut = {
                split: rows
                for split, paths in files.items()
                if (rows := [r for p in paths for r in _rows(p) if r.get("subject") == subject])
            }
            if not cut:
                continue
            target = work / "rows" / parent / subject
            target.mkdir(parents=True, exist_ok=True)
            written: dict[str, list[Path]] = {}
            for split, rows in cut.items():
                path = target / f"{split}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                written[split] = [path]
            return written
    return {}


def columns(files: Mapping[str, Sequence[Path]]) -> set[str]:
    """Column names of the first file."""
    path = next(iter(files.values()))[0]
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return set(parquet.read_schema(path).names)
    rows = _rows(path)
    return set(rows[0]) if rows else set()


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".csv":
        import csv

        with path.open(newline="") as file:
            return [dict(row) for row in csv.DictReader(file)]
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise InputRejected(f"{path}: not valid JSON ({error})") from None


def override(
    task: str, source_yaml: Path, config: Mapping[str, Any], files: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """An lm-eval task config that is `source_yaml` with its data taken from `files`.

    Splits the files lack are switched off, so that a test file alone is enough.
    """
    evaluated = [s for k in ("test_split", "validation_split") if (s := config.get(k))]
    if "*" in files and evaluated:
        files = {evaluated[0]: files["*"]}
    suffix = next(iter(files.values()))[0].suffix
    changed: dict[str, Any] = {
        "include": str(source_yaml),
        "task": task,
        "dataset_path": BUILDERS[suffix],
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {s: [str(p.resolve()) for p in paths] for s, paths in files.items()}
        },
    }
    for split_key in SPLIT_KEYS:
        wanted = config.get(split_key)
        if wanted is not None and wanted not in files:
            changed[split_key] = None
    if not any(split in files for split in evaluated):
        names = " or ".join(evaluated)
        raise InputRejected(
            f"the local data of {task} has no split {names} (found: {', '.join(sorted(files))})",
            f"name the file {names.split(' ')[0]}.jsonl or .parquet",
        )
    return changed
