"""Errors a user can cause or meet: one line, one hint, one exit code each."""


class QuantkitError(Exception):
    """A run that failed (exit code 1). `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QuantkitError):
    """The command line asks for something that cannot be (exit code 2)."""

    exit_code = 2


class InputRejected(QuantkitError):
    """The input checkpoint or data is unsafe, corrupt, stale or unsupported (exit code 3)."""

    exit_code = 3


class BelowGate(QuantkitError):
    """A result fell below the gate set by `--fail-under` (exit code 4)."""

    exit_code = 4
