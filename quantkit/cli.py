"""The command line: one verb per stage, each looked up in `quantkit/commands/`."""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from quantkit import __version__, console
from quantkit.errors import Interrupted, QuantkitError


def _thread_settings(cpus: int, runnable: int) -> dict[str, str]:
    """How OpenMP's threads wait for one another: torch reads it when it is first imported.

    Thousands of short operations in a row want threads that spin a while instead of sleeping at
    once (a quarter of the time of a `pack` on two cores); beside other work every spin is a turn
    that others lack.
    """
    if runnable >= cpus / 2:
        return {"OMP_WAIT_POLICY": "PASSIVE"}
    return {"GOMP_SPINCOUNT": "4000"}  # of about 50 ns; libgomp's own choice is 75 times that


def _runnable() -> int:
    """Threads that run or could, this one not counted; as if many where nobody says."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return sys.maxsize


if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ.update(_thread_settings(os.cpu_count() or 1, _runnable()))

# Verb, file in quantkit/commands/ (function `run`, or an `app` of its own), as data flows.
COMMANDS: tuple[tuple[str, str], ...] = (
    ("convert", "convert"),
    ("calibrate", "calibrate"),
    ("smooth", "smooth"),
    ("separate-outliers", "separate_outliers"),
    ("rotate", "rotate"),
    ("plan", "plan"),
    ("pack", "pack"),
    ("export", "export"),
    ("eval", "eval"),
    ("diagnose", "diagnose"),
    ("demo", "demo"),
    ("inspect", "inspect"),
    ("doctor", "doctor"),
    ("kernels", "kernels"),
    ("bench", "bench"),
)

app = typer.Typer(
    help="W4A4 quantization of Hugging Face checkpoints: every step reads one and writes one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        print(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _examples(examples: tuple[tuple[str, str], ...]) -> str | None:
    """A command's EXAMPLES (command line, what it does) as the last paragraphs of its help."""
    if not examples:
        return None
    return "\n\n".join(["Examples:", *(f"{line}  # {what}" for line, what in examples)])


def _interruptible(run: Callable[..., None]) -> Callable[..., None]:
    """Say what an interrupt means: typer would leave with its code and no word."""

    @functools.wraps(run)
    def inner(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted", "run the same command again to continue") from error

    return inner


for _verb, _module in COMMANDS:
    _command = importlib.import_module(f"quantkit.commands.{_module}")
    if hasattr(_command, "app"):
        app.add_typer(_command.app, name=_verb)
    else:
        _epilog = _examples(getattr(_command, "EXAMPLES", ()))
        app.command(_verb, epilog=_epilog)(_interruptible(_command.run))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code (0, 1, 2, 3, 4 or 130)."""
    try:
        app(arguments)
    except QuantkitError as error:
        _fail(error.message, error.hint, error.exit_code, error)
    except OSError as error:
        hint = None
        if error.errno == errno.ENOSPC:
            hint = "free some space and run the same command again: finished work is kept"
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", hint, 1, error)
    except MemoryError as error:
        _fail("out of memory", "use fewer or shorter samples", 1, error)
    except Exception as error:  # a defect of ours: still one line, the traceback on request
        _fail(
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "this is a defect of quantkit; QUANTKIT_DEBUG=1 shows the traceback",
            1,
            error,
        )


def _fail(message: str, hint: str | None, code: int, error: BaseException) -> None:
    if os.environ.get("QUANTKIT_DEBUG"):
        raise error
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    console.OUTPUT.quiet = True
    sys.exit(code)
