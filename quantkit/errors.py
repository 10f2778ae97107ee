"""Errors a user can cause or meet: one line, one hint, one exit code each."""


def one_line(text: str) -> str:
    """`text` fit to be shown: control characters, which may come from a stranger's file, as `?`,
    line breaks as spaces, and the middle cut out of what is very long."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    return shown if len(shown) <= 1000 else f"{shown[:600]} ... {shown[-300:]}"


class QuantkitError(Exception):
    """A run that failed (exit code 1). `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)


class UsageError(QuantkitError):
    """The command line asks for something that cannot be (exit code 2)."""

    exit_code = 2


class InputRejected(QuantkitError):
    """The input checkpoint or data is unsafe, corrupt, stale or unsupported (exit code 3)."""

    exit_code = 3


class BelowGate(QuantkitError):
    """A result fell below the gate set by `--fail-under` (exit code 4)."""

    exit_code = 4


class Interrupted(QuantkitError):
    """The user ended the run (exit code 130)."""

    exit_code = 130
