"""Text through the `datasets` library: Hub ids, its cache, saved data sets, parquet and arrow."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from quantkit.data.sources import PIECE, Pieces, text_of
from quantkit.errors import InputRejected, QuantkitError

ALTERNATIVES = (
    "without a network give --data sample (shipped), a local folder, text, JSONL or parquet file, "
    "or tokens.safetensors:key"
)
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def open_dataset(spec: str, *, held_out: bool) -> tuple[Pieces, str]:
    """Open `id[:config[:split[:column]]]`; empty parts mean the default.

    The cache of `datasets` is used when it has the data. Raises QuantkitError when the Hub cannot
    be reached and InputRejected when it does not have what is asked for.
    """
    datasets = _library()
    parts = [part or None for part in spec.split(":")]
    if len(parts) > 4:
        raise InputRejected(f"{spec!r}: more parts than id:config:split:column")
    name, config, split, column = (*parts, None, None, None)[:4]
    if name is None:
        raise InputRejected(f"{spec!r} names no data")
    lines = "wikitext" in name
    if name == "wikitext":
        name, config = WIKITEXT[0], config or WIKITEXT[1]
    split = split or ("test" if held_out else "train")
    answers = reachable()
    # Only what is read of a large data set should travel; a small one is better kept in the cache.
    streaming = answers and not lines
    try:
        with offline(datasets, not answers):
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise _explained(spec, error, answers) from None
    shown = ":".join(part for part in (name, config, split) if part)
    return _rows(rows, column, shown, lines), f"data set {shown}"


def open_saved(folder: Path, column: str | None, held_out: bool) -> tuple[Pieces, str]:
    """Open a folder written by `save_to_disk`; of several splits, train (or test)."""
    datasets = _library()
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputRejected(f"{folder}: {' '.join(str(error).split())[:160]}") from None
    split = ""
    if isinstance(rows, dict):
        wanted = "test" if held_out else "train"
        split = wanted if wanted in rows else next(iter(rows))
        rows = rows[split]
    shown = f"{folder}/ (local{', ' + split if split else ''})"
    return _rows(rows, column, str(folder), "wikitext" in str(folder)), shown


def open_tables(files: list[Path], column: str | None, *, lines: bool) -> Pieces:
    """Read the rows of local parquet or arrow files in order, without copying them to a cache."""
    datasets = _library()
    for file in files:
        try:
            if file.suffix == ".arrow":
                rows: Iterable[Any] = datasets.Dataset.from_file(str(file))
            else:
                rows = datasets.load_dataset(
                    "parquet", data_files=str(file), split="train", streaming=True
                )
        except Exception as error:
            raise InputRejected(f"{file}: {' '.join(str(error).split())[:160]}") from None
        yield from _rows(rows, column, str(file), lines)


def _rows(rows: Iterable[Any], column: str | None, shown: str, lines: bool) -> Pieces:
    """One document a row; with `lines`, rows are the lines of one text."""
    held: list[str] = []
    size = 0
    iterator = iter(rows)
    number = 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            break
        except Exception as error:  # a damaged file shows when its rows are read
            raise InputRejected(f"{shown}: {' '.join(str(error).split())[:160]}") from None
        number += 1
        text = text_of(row, column, f"{shown}, row {number}")
        if not lines:
            yield text, True
            continue
        held.append(text)
        size += len(text)
        if size > PIECE:
            yield "".join(held), False
            held, size = [], 0
    if held:
        yield "".join(held), True


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise QuantkitError(
            "the `datasets` library is not installed", "pip install datasets; " + ALTERNATIVES
        ) from None
    datasets.disable_progress_bars()
    return datasets


def reachable(seconds: float = 3.0) -> bool:
    """Ask whether the Hub answers at all: its client would retry for half a minute."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # not ours to dial directly
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True


@contextmanager
def offline(datasets: ModuleType, cut_off: bool) -> Iterator[None]:
    """Let the libraries look into their caches only, when `cut_off`."""
    import huggingface_hub

    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [(place, name, getattr(place, name, False)) for place, name in places]
    try:
        for place, name, value in before:
            setattr(place, name, cut_off or value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _explained(spec: str, error: Exception, reachable: bool) -> QuantkitError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if not reachable:
        return QuantkitError(
            f"{spec}: the Hub cannot be reached and has no copy here", ALTERNATIVES
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return QuantkitError(f"{spec}: {reason}", ALTERNATIVES)
    return InputRejected(f"{spec}: {reason}", ALTERNATIVES)
