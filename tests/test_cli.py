"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys

from quantkit import __version__


def quantkit(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def test_version_is_the_packages() -> None:
    done = quantkit("--version")
    assert done.returncode == 0
    assert done.stdout.strip() == f"quantkit {__version__}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, quantkit.cli\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'lm_eval'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_verb_is_a_usage_error() -> None:
    done = quantkit("no-such-verb")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
