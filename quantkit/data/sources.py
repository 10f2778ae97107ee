"""Where calibration text comes from: the shipped sample, local files, or a `datasets` id.

Every source is an iterator of (piece of text, whether a document ends here) in a fixed order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import InputRejected

Pieces = Iterator[tuple[str, bool]]
TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow")
PIECE = 64 * 1024  # characters handed to the tokenizer at once


@dataclass(frozen=True)
class Source:
    """Text that was found: its pieces, and in words what they are."""

    pieces: Pieces
    description: str


def open_source(spec: str, *, held_out: bool = False) -> Source:
    """Find the text that `--data SPEC` means; `held_out` prefers a test split where there is one.

    `sample`; a local file or folder, optionally `:column`; else a `datasets` id, optionally
    `:config:split:column`. Raises InputRejected when there is no text to be had.
    """
    if spec == "sample":
        folder = Path(__file__).parent / "sample" / ("test" if held_out else "train")
        return Source(_files(sorted(folder.glob("*.txt")), None), "the shipped sample text")
    path, column = _local(spec)
    if path is not None:
        return _local_source(path, column, held_out)
    if spec.startswith((".", "/", "~")) or spec.endswith((*TEXT, *JSON_LINES, *TABLES)):
        raise InputRejected(f"{spec}: no such file or folder", "give text, JSONL, parquet")
    from quantkit.data.hub import open_dataset

    return Source(*open_dataset(spec, held_out=held_out))


def _local(spec: str) -> tuple[Path | None, str | None]:
    path = Path(spec).expanduser()
    if _exists(path):
        return path, None
    head, colon, column = spec.rpartition(":")
    if colon and head and _exists(Path(head).expanduser()):
        return Path(head).expanduser(), column or None
    return None, None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or not a file name at all
        return False


def _local_source(path: Path, column: str | None, held_out: bool) -> Source:
    if path.is_file():
        files = [path]
    else:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            from quantkit.data.hub import open_saved

            return Source(*open_saved(path, column, held_out))
        files = _chosen(path, held_out)
    tables = [file for file in files if file.suffix in TABLES]
    if not tables:
        return Source(_files(files, column), _named(path, files))
    from quantkit.data.hub import open_tables

    return Source(open_tables(tables, column, lines="wikitext" in str(path)), _named(path, files))


def _named(path: Path, files: list[Path]) -> str:
    return f"{path} (local file)" if path.is_file() else f"{path}/ (local, {len(files)} files)"


def _chosen(folder: Path, held_out: bool) -> list[Path]:
    """The files of a folder to read: one format, one split, one edition, in the order of names."""
    raw = folder / "wikitext-2-raw-v1"
    if folder.name == "wikitext" and raw.is_dir():
        folder = raw
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not _hidden(f, folder))
    for formats in (TABLES, JSON_LINES, TEXT):
        found = [file for file in files if file.suffix in formats]
        if found:
            break
    else:
        raise InputRejected(f"{folder}: no text, JSONL, parquet or arrow files in it")
    for word in ("test", "valid") if held_out else ("train",):
        split = [f for f in found if word in str(f.relative_to(folder)).lower()]
        if split:
            return split
    return found


def _hidden(file: Path, folder: Path) -> bool:
    names = file.relative_to(folder).parts
    about = ("dataset_infos.json", "dataset_info.json", "state.json", "readme.md")
    return any(name.startswith(".") for name in names) or names[-1].lower() in about


def _files(files: list[Path], column: str | None) -> Pieces:
    for file in files:
        if file.suffix in JSON_LINES:
            yield from _json_file(file, column)
        else:
            yield from _text_file(file)


def _text_file(file: Path) -> Pieces:
    """Read a text file as one document, in pieces that end at line ends."""
    try:
        with open(file, encoding="utf-8", newline=None) as stream:
            while lines := stream.readlines(PIECE):
                yield "".join(lines), False
    except UnicodeDecodeError:
        raise InputRejected(f"{file}: not UTF-8 text") from None
    yield "", True


def _json_file(file: Path, column: str | None) -> Pieces:
    """Read one JSON object a line (or a JSON list of objects), one document each."""
    try:
        with open(file, encoding="utf-8") as stream:
            first = stream.read(1)
            stream.seek(0)
            if first == "[":
                rows = ((i, row) for i, row in enumerate(json.load(stream)))
            else:
                rows = ((i, json.loads(line)) for i, line in enumerate(stream) if line.strip())
            for number, row in rows:
                yield text_of(row, column, f"{file}, entry {number + 1}"), True
    except UnicodeDecodeError:
        raise InputRejected(f"{file}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise InputRejected(f"{file}: bad JSON: {str(error)[:120]}") from None


def text_of(row: object, column: str | None, where: str) -> str:
    """Take the text out of a row: the column asked for, `text`, or the only column of strings."""
    if isinstance(row, str) and column is None:
        return row
    if not isinstance(row, dict):
        raise InputRejected(f"{where}: not an object with columns")
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if column is None:
        column = "text" if "text" in texts or len(texts) != 1 else texts[0]
    value = row.get(column)
    if not isinstance(value, str):
        raise InputRejected(
            f"{where}: no text in column {column!r}",
            f"columns of text: {', '.join(map(str, texts)) or 'none'}; "
            "give one as the last part of --data",
        )
    return value
