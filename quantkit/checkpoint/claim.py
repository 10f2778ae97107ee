"""Who may write an output: refuse what would destroy something, lock, tell two runs apart."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise UsageError when `output` exists (without overwrite) or is mixed up with the input."""
    here, there = output.resolve(), source.resolve()
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(
            f"{output}: the output cannot be the input or lie inside it",
            "a step never changes files in place: give another output with -o",
        )
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output}: exists and is not a folder", "give another output with -o")
    if output.exists() and not overwrite:
        raise UsageError(
            f"{output}: exists already", "give --overwrite to replace it, or another -o"
        )


def lock_folder(partial: Path) -> int:
    """Create the folder and hold its lock; QuantkitError when another run does."""
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # another run finished and removed the folder in between
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise QuantkitError(
                f"{partial}: another run is writing this output", "wait for it, or give another -o"
            ) from None
        try:
            if os.fstat(lock).st_ino == (partial / "lock").stat().st_ino:
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)  # we locked a file that is no longer the lock


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name what differs between two fingerprints: `scheme: 'osc', now 'mxfp4'`."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key in value for k, v in flat(value[key], f"{prefix}.{key}").items()}

    before, after = flat(old), flat(new)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    shown = [
        f"{name.removeprefix('.fingerprint').lstrip('.')} was {_brief(before.get(name))}, "
        f"now {_brief(after.get(name))}"
        for name in names[:4]
    ]
    return "; ".join(shown) + ("; ..." if len(names) > 4 else "")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
