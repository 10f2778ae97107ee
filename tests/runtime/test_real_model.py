"""A real model (QUANTKIT_TEST_MODEL) through calibrate, pack and load, on the shipped text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.calibrate import layerwise
from quantkit.checkpoint.step import Target
from quantkit.data.tokens import load_tokens
from quantkit.evaluate.perplexity import negative_log_likelihood
from quantkit.export.export import Options, export
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack

MODEL = os.environ.get("QUANTKIT_TEST_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MODEL is None, reason="QUANTKIT_TEST_MODEL names no model"),
    pytest.mark.usefixtures("elsewhere"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with statistics of 8 windows of 512 tokens."""
    target = tmp_path_factory.mktemp("real") / "calibrated"
    layerwise.calibrate(MODEL, layerwise.Options("sample", samples=8, seq_len=512), Target(target))
    return target


def loss(model: Any, folder: Path) -> float:
    tokens = load_tokens("sample", folder, samples=4, seq_len=512, seed=99).ids
    return float(negative_log_likelihood(model, tokens).double().mean())


def test_separation_recovers_most_of_what_rounding_loses(source: Path, tmp_path: Path) -> None:
    losses = {"original": loss(quantkit.load(source), source)}
    for scheme in ("mxfp4", "osc"):
        packed = pack(source, PackOptions(scheme), Target(tmp_path / scheme)).output
        losses[scheme] = loss(quantkit.load(packed), source)
    excess = {name: value - losses["original"] for name, value in losses.items()}
    assert excess["mxfp4"] > 0.1
    # The OSC paper recovers 64 % of the loss of direct rounding (its table 1).
    assert 1 - excess["osc"] / excess["mxfp4"] >= 0.64


PLAIN = {
    "mxfp4": PackOptions("mxfp4"),
    "nvfp4": PackOptions("nvfp4"),
    "mixed": PackOptions("mxfp4", sites={"mlp_out": "mxfp8", "attn_out": "nvfp4"}),
}
STOCK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    save_file({"logits": model(load_file(ids)["ids"]).logits.float()}, out)
assert "quantkit" not in sys.modules
"""


@pytest.mark.parametrize("name", PLAIN)
def test_stock_transformers_gives_the_reference_logits(
    source: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("compressed_tensors")
    packed = pack(source, PLAIN[name], Target(tmp_path / "packed")).output
    exported = export(packed, Options(), Target(tmp_path / "exported")).output
    ids, out = tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
    save_file({"ids": load_tokens("sample", source, samples=1, seq_len=256).ids}, ids)
    with torch.no_grad():
        ours = quantkit.load(exported)(load_file(ids)["ids"]).logits.float()
    # Isolated: the working folder and PYTHONPATH do not lead to quantkit.
    arguments = [sys.executable, "-I", "-c", STOCK, str(exported), str(ids), str(out)]
    subprocess.run(arguments, check=True, timeout=600)
    theirs = load_file(out)["logits"]
    assert (theirs - ours).norm() <= 1e-3 * ours.norm()


@pytest.mark.parametrize("scheme", ["osc", "mxfp4"])
def test_from_pretrained_gives_the_logits_of_load(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    from transformers import AutoModelForCausalLM

    packed = pack(source, PackOptions(scheme), Target(tmp_path / "packed")).output
    ids = load_tokens("sample", source, samples=1, seq_len=256).ids
    with torch.no_grad():
        ours = quantkit.load(packed)(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(packed)(ids).logits, ours)
        spread = AutoModelForCausalLM.from_pretrained(packed, device_map="auto")
        assert torch.equal(spread(ids).logits, ours)


def test_generates_text(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    packed = pack(source, PackOptions("osc"), Target(tmp_path / "osc")).output
    model, tokenizer = quantkit.load(packed), AutoTokenizer.from_pretrained(packed)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert made.shape[1] == prompt.shape[1] + 64
    assert "Paris" in tokenizer.decode(made[0])
