"""The depth-register example at toy size: trains, resumes, diagnoses, prints every table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "depth_registers"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(runs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE / "run.py", "--smoke", "--seeds", "0", "--runs", runs]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )


def test_smoke_run_writes_every_figure(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert set(found) == {"baseline-0", "registers-0", "registers+sink-0"}
    for name, figures in found.items():
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["model_type"] == ("llama" if "base" in name else "depth_register_llama")
        assert len(figures["kurtosis"]["mlp_out"]) == config["num_hidden_layers"]
        assert figures["perplexity"] < 512, "no better than guessing among 512 tokens"
    assert "mlp_out dominates the residue" in done.stdout


def test_interrupted_training_continues_to_the_same_weights(tmp_path: Path) -> None:
    code = f"""
import sys, dataclasses, torch
sys.path.insert(0, {str(EXAMPLE)!r})
from pathlib import Path
import run, train
runs = Path({str(tmp_path)!r})
run.toy_corpus(runs / "corpus" / "corpus.safetensors")
recipe = train.Recipe(**{{**run.SMOKE, "steps": 8, "save_every": 3, "registers": 2, "sink": True}})
corpus = runs / "corpus" / "corpus.safetensors"
train.train(recipe, corpus, runs / "whole", "cpu")
calls = 0
real = train.windows
def stop(*arguments):
    global calls
    calls += 1
    if calls == 6:
        raise KeyboardInterrupt
    return real(*arguments)
train.windows = stop
try:
    train.train(recipe, corpus, runs / "cut", "cpu")
except KeyboardInterrupt:
    pass
assert (runs / "cut" / "state.safetensors").exists()
train.windows = real
train.train(recipe, corpus, runs / "cut", "cpu")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole, cut = (tmp_path / n / "model.safetensors" for n in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
