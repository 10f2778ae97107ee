"""The example scripts run as their first lines say, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.data.tokens import load_tokens
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
    text = ("--data", "sample", "--windows", "2", "--seq-len", "32")
    options = (*text, "--only", "mxfp4, gptq", "--jobs", "2")
    both = ("model-calibrated", "model-calibrated")
    out = example("compare_schemes.py", *both, *options)
    name = "mxfp4, gptq"
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == ["original", name]
    table = json.loads(Path("schemes.json").read_text())
    assert set(table["schemes"][name]) == {"0", "1"}
    assert 4.2 < table["schemes"][name]["0"]["bits"] < 4.3
    assert Path("schemes.md").read_text().count("\n") == 4

    # What is there is not made again; what is missing is; peers on the same tokens join in.
    del table["schemes"][name]["1"]
    table["schemes"][name]["0"]["excess"] = 9.0
    Path("schemes.json").write_text(json.dumps(table))
    digest = table["original"]["digest"]
    peers = [
        {"name": "peer", "bits": 4.25, "excess": 0.5, "stderr": 0.1, "digest": digest},
        {"name": "elsewhere", "bits": 4.25, "excess": 0.5, "stderr": 0.1, "digest": "other"},
    ]
    Path("peers.json").write_text(json.dumps(peers))
    out = example("compare_schemes.py", *both, *options, "--peers", "peers.json")
    after = json.loads(Path("schemes.json").read_text())
    assert after["schemes"][name]["0"]["excess"] == 9.0
    assert "1" in after["schemes"][name]
    assert "peer" in Path("schemes.md").read_text()
    assert "elsewhere" not in Path("schemes.md").read_text()


def test_peer_losses_are_the_same_losses(workspace: Workspace) -> None:
    from safetensors.torch import save_file

    ids = torch.randint(3, 256, (3, 32), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids}, "tokens.safetensors")
    example("peer_losses.py", "model", "exact.json", "--tokens", "tokens.safetensors:ids")
    code = (
        "from peer_losses import record; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained('model', dtype='auto');"
        "m.lm_head.weight.data *= 0; record(m, 'blind', 1.0, 'exact.json', 'peers.json')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    (row,) = json.loads(Path("peers.json").read_text())
    assert row["digest"] == load_tokens("tokens.safetensors:ids", Path("model"), samples=3).digest
    exact = torch.tensor(json.loads(Path("exact.json").read_text())["losses"])
    assert row["excess"] == pytest.approx(math.log(256) - float(exact.mean()), abs=1e-4)


def test_offline_tasks(workspace: Workspace) -> None:
    pytest.importorskip("lm_eval")
    out = example("offline_tasks.py", "questions")
    assert out.startswith("281 questions")
    assert len(Path("questions/mmlu/test.jsonl").read_text().splitlines()) == 281


def test_transforms_table(workspace: Workspace) -> None:
    options = ["--data", "wikitext", "--held", "wikitext", "--samples", "8", "--seq-len", "32"]
    options += ["--windows", "2", "--steps", "4", "--batch", "64", "-o", "table", "--only"]
    rows = "nothing|mxfp4,smooth max|osc,smooth learned + block 32|osc of 64,global R1 + R4|osc"
    out = example("transforms_table.py", "model-calibrated", *options, rows)
    found = json.loads(Path("table/transforms.json").read_text())
    assert set(found) == {"original", *rows.split(",")}
    assert len({found[cell]["perplexity"] for cell in found}) == 5
    assert out == Path("table/transforms.md").read_text() + "\n"
    # Nothing is left to do: nothing is packed.
    assert example("transforms_table.py", "model-calibrated", *options, rows) == out


def test_smoothrot_table(workspace: Workspace) -> None:
    options = ["--data", "wikitext", "--samples", "20", "--seq-len", "32", "--steps", "4"]
    out = example("smoothrot_table.py", "model", *options, "--trial", "2", "-o", "table")
    assert "int4:full" in out
    tables = json.loads(Path("table/table.json").read_text())
    assert set(tables) == {"int4:full", "mxfp4:32"}
    for table in tables.values():
        assert len(table["layers"]) == 2
        for row in table["layers"]:
            assert 0 < row["learned"]["normalised"] < 1.1 * row["none"]["normalised"]
    assert example("smoothrot_table.py", "model", *options, "--trial", "2", "-o", "table") == out
