"""The command line as a user meets it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import __version__, cli
from tests import workspace as workspaces
from tests.workspace import Shell, Workspace


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


VERBS = [verb for verb, _ in cli.COMMANDS]
EXAMPLES = [
    (line, what)
    for _, module in cli.COMMANDS
    for line, what in getattr(
        importlib.import_module(f"quantkit.commands.{module}"), "EXAMPLES", ()
    )
]
# The steps of a user's first session, each on what the one before left.
STEPS = {
    "calibrate": ("calibrate", "model", "--data", "sample", "--samples", "2", "--seq-len", "32"),
    "separate-outliers": ("separate-outliers", "model-calibrated"),
    "smooth": (
        *("smooth", "model-calibrated", "--method", "max", "--samples", "5", "--seq-len", "32"),
    ),
    "plan": (
        *("plan", "model-calibrated", "--bits", "4.75", "--samples", "2", "--windows", "2"),
        *("--seq-len", "32"),
    ),
    "pack": ("pack", "model-calibrated", "--scheme", "mxfp4", "-o", "again"),
    "export": ("export", "model-osc", "--fold-outliers", "--windows", "1", "--seq-len", "32"),
    "eval": ("eval", "model-osc", "--limit", "2", "--seq-len", "32"),
    "diagnose": (
        *("diagnose", "model-calibrated", "--quick", "--windows", "2", "--seq-len", "32"),
        *("--noise-windows", "1"),
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_says_what_it_does(verb: str, shell: Shell) -> None:
    done = shell(verb, "--help")
    assert done.code == 0
    first = done.out.partition("Usage:")[2].splitlines()[2]
    assert len(first.strip()) > 20, done.out


@pytest.mark.parametrize(("line", "what"), EXAMPLES, ids=[line for line, _ in EXAMPLES])
def test_every_example_of_the_help_works(
    line: str, what: str, workspace: Workspace, shell: Shell
) -> None:
    verb, *arguments = shlex.split(line)[1:]
    assert what in " ".join(shell(verb, "--help").out.split())
    if verb == "demo" and not arguments:
        pytest.skip("fetches a model")
    if verb == "bench" and not torch.cuda.is_available():
        pytest.skip("times a GPU")
    if "model-pickled" in arguments:
        pickled = workspaces.copy(workspace.path / "model", workspace.path / "model-pickled").path
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
    for name in ("model-smoothed", "model-rotated"):  # outputs that some examples begin with
        if name in arguments:
            workspaces.copy(workspace.path / "model-calibrated", workspace.path / name)
    for scheme in ("mxfp4", "nvfp4"):
        if f"model-{scheme}" in arguments:
            assert shell("pack", "model-calibrated", "--scheme", scheme).code == 0
    if "plan.json" in arguments and verb == "pack":
        assert shell(*STEPS["plan"]).code == 0
    for output in {"calibrate": ["model-calibrated"], "pack": ["model-osc"]}.get(verb, []):
        shutil.rmtree(workspace.path / output)
    done = shell(verb, *arguments, *SHORTER.get(verb, ()))
    assert done.code in (0, 4 if "--fail-under" in line else 0), done.err


# Examples are written for real models; here the same lines look at less text.
SHORTER = {
    "eval": ("--limit", "2", "--seq-len", "32"),
    "export": ("--windows", "1", "--seq-len", "32"),
    "diagnose": ("--windows", "2", "--seq-len", "32", "--noise-windows", "1"),
    "demo": ("--samples", "2", "--windows", "2", "--seq-len", "32"),
    "calibrate": ("--samples", "2", "--seq-len", "32"),
    "plan": ("--samples", "2", "--windows", "2", "--seq-len", "32"),
    "smooth": ("--samples", "5", "--seq-len", "32"),
}


@pytest.mark.parametrize("verb", STEPS)
def test_quiet_prints_a_path_and_nothing_else(
    verb: str, workspace: Workspace, shell: Shell
) -> None:
    done = shell(*STEPS[verb], "-q", *_overwrite(verb))
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    assert Path(line).exists()
    assert all(said.startswith("warning: ") for said in done.err.splitlines()), done.err


@pytest.mark.parametrize("verb", STEPS)
def test_json_is_one_object_on_stdout(verb: str, workspace: Workspace, shell: Shell) -> None:
    done = shell(*STEPS[verb], "--json", *_overwrite(verb))
    assert done.code == 0, done.err
    assert isinstance(json.loads(done.out), dict)


@pytest.mark.parametrize("verb", STEPS)
def test_output_for_a_pipe_has_no_escapes_and_no_bars(
    verb: str, workspace: Workspace, shell: Shell
) -> None:
    done = shell(*STEPS[verb], *_overwrite(verb))
    assert done.code == 0, done.err
    assert done.out.strip()
    for text in (done.out, done.err):
        assert "\x1b" not in text
        assert "\r" not in text


@pytest.mark.parametrize("verb", STEPS)
def test_a_dry_run_writes_nothing(verb: str, workspace: Workspace, shell: Shell) -> None:
    if "--dry-run" not in shell(verb, "--help").out:
        pytest.skip(f"{verb} has no --dry-run")
    before = _listing(workspace.path)
    done = shell(*STEPS[verb], "--dry-run", *_overwrite(verb))
    assert done.code == 0, done.err
    assert done.out.strip()
    assert _listing(workspace.path) == before


@pytest.mark.parametrize("verb", [*STEPS, "inspect"])
def test_a_missing_checkpoint_is_one_line_and_a_hint(
    verb: str, workspace: Workspace, shell: Shell
) -> None:
    done = shell(verb, "./not-there")
    assert done.code == 3
    assert done.out == ""
    assert re.fullmatch(r"error: .*not-there.*\nhint: .*\n", done.err), done.err


def test_no_checkpoint_and_no_earlier_step_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("eval", "inspect", "pack", "plan", "diagnose"):
        done = shell(verb)
        assert done.code == 2
        assert done.err.startswith("error: no checkpoint given")


def test_a_gate_that_is_not_reached_is_code_4(workspace: Workspace, shell: Shell) -> None:
    done = shell(*STEPS["eval"], "--fail-under", "1000")
    assert done.code == 4
    assert "original" in done.out  # the report is printed all the same
    assert re.search(r"^error: .* below 1000 %$", done.err, re.M)
    assert shell(*STEPS["eval"], "--fail-under", "1").code == 0


def test_an_interrupt_is_code_130(
    workspace: Workspace, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.evaluate import run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "evaluate", interrupted)
    done = shell(*STEPS["eval"])
    assert done.code == 130
    assert "interrupted" in done.err


def test_a_defect_is_one_line_unless_asked(
    workspace: Workspace, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.evaluate import run

    def broken(*_: object) -> None:
        raise RuntimeError("a bug\nover two lines")

    monkeypatch.setattr(run, "evaluate", broken)
    done = shell(*STEPS["eval"])
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "error: RuntimeError: a bug over two lines" in done.err
    monkeypatch.setenv("QUANTKIT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        shell(*STEPS["eval"])


def test_the_step_that_takes_the_last_output_names_it(workspace: Workspace, shell: Shell) -> None:
    done = shell("eval", "--limit", "1", "--seq-len", "32")
    assert done.code == 0
    assert re.search(r"^checkpoint: .*model-osc \(the last output", done.err, re.M)


def test_no_color_is_honoured(workspace: Workspace) -> None:
    command = [sys.executable, "-m", "quantkit", "--help"]
    script = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"  # a terminal to write to
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", done.stdout)  # bold may stay, colours not


@pytest.mark.parametrize("verb", ["calibrate", "smooth", "plan", "pack", "eval", "diagnose"])
def test_a_dry_run_says_how_long_and_how_much_memory(
    verb: str, workspace: Workspace, shell: Shell
) -> None:
    done = shell(*STEPS[verb], "--dry-run", "--json", *_overwrite(verb))
    found = json.loads(done.out)
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 0


def _overwrite(verb: str) -> tuple[str, ...]:
    return ("--overwrite",) if verb == "calibrate" else ()


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("cpus", "runnable", "setting"),
    [
        (2, 0, "GOMP_SPINCOUNT"),
        (2, 1, "OMP_WAIT_POLICY"),
        (64, 31, "GOMP_SPINCOUNT"),
        (64, 40, "OMP_WAIT_POLICY"),
        (1, sys.maxsize, "OMP_WAIT_POLICY"),
    ],
)
def test_threads_sleep_on_a_busy_machine(cpus: int, runnable: int, setting: str) -> None:
    assert set(cli._thread_settings(cpus, runnable)) == {setting}


def test_the_users_own_thread_settings_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, quantkit.cli; print(sorted(k for k in os.environ if 'OMP_' in k))"
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    assert run([sys.executable, "-c", code]).stdout.strip() in (
        "['OMP_WAIT_POLICY']",
        "['GOMP_SPINCOUNT']",
    )
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert run([sys.executable, "-c", code]).stdout.strip() == "['GOMP_SPINCOUNT']"
