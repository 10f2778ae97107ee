"""`quantkit doctor`: what this machine can compile, and what would run for each format."""

from __future__ import annotations

from quantkit import console
from quantkit.commands.common import Json, show

EXAMPLES = (
    ("quantkit doctor", "what would run here for each format, and why"),
    ("quantkit doctor --json", "the same for a program"),
)


def run(json: Json = False) -> None:
    """Print compiler, versions, GPU, kernel cache, and what would run for each format and why."""
    from quantkit.kernels.doctor import as_text, examine

    show(json, quiet=False)
    found = examine()
    console.result(found, as_text(found))
