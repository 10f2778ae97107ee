"""The example scripts run as their first lines say, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workspace import Workspace

ROOT = Path(__file__).parent.parent.parent


def example(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compare_schemes(workspace: Workspace) -> None:
    options = ("--windows", "2", "--seq-len", "32", "--only", "4-bit mlp_out")
    out = example("compare_schemes.py", "model-calibrated", *options)
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "original",
        "osc, 4-bit mlp_out, groups of 32",
        "osc, 4-bit mlp_out, groups of 64",
    ]


def test_offline_tasks(workspace: Workspace) -> None:
    pytest.importorskip("lm_eval")
    out = example("offline_tasks.py", "questions")
    assert out.startswith("281 questions")
    assert len(Path("questions/mmlu/test.jsonl").read_text().splitlines()) == 281
