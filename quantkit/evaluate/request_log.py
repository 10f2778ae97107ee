"""A durable log of answered evaluation requests: a killed run continues where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def key(kind: str, arguments: Sequence[Any]) -> str:
    """Name a request by what is asked: its kind and arguments, in canonical JSON."""
    text = json.dumps([kind, list(arguments)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class RequestLog:
    """Answers by request, appended to a JSON Lines file as they come.

    One line is one answer; a line torn by a kill is ignored when the file is read again. The file
    belongs to one model (its name carries the digest of the weights), so an answer never has to
    be invalidated. JSON, not a pickle: a cache folder must not be able to run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    try:
                        entry = json.loads(line)
                        self.answers[entry["k"]] = entry["a"]
                    except (ValueError, KeyError, TypeError):
                        continue
        self._file = path.open("ab")
        # NOTE: a torn tail would glue itself to the next line; cut it off first
        self._file.truncate(whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sync()
        self._file.close()

    def get(self, kind: str, arguments: Sequence[Any]) -> Any:
        """The answer given earlier, or None."""
        return self.answers.get(key(kind, arguments))

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Record one answer (the name is the one lm-eval's models call on their cache hook)."""
        name = key(kind, arguments)
        if name in self.answers:
            return
        self.answers[name] = answer
        line = json.dumps({"k": name, "a": answer}) + "\n"
        self._file.write(line.encode())

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
