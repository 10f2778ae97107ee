"""A real model (QUANTKIT_TEST_MODEL) through calibrate, pack and load, on the shipped text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.checkpoint.step import Target
from quantkit.data.tokens import load_tokens
from quantkit.evaluate.perplexity import negative_log_likelihood
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
    calibrate(MODEL, Options("sample", samples=8, seq_len=512), Target(target))
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


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_stock_transformers_gives_the_reference_logits(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    packed = pack(source, PackOptions(scheme), Target(tmp_path / scheme)).output
    ids = load_tokens("sample", source, samples=1, seq_len=256).ids
    with torch.no_grad():
        ours = quantkit.load(packed)(ids).logits.float()
        theirs = AutoModelForCausalLM.from_pretrained(packed).eval()(ids).logits.float()
    assert (theirs - ours).norm() <= 1e-3 * ours.norm()


def test_generates_text(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    packed = pack(source, PackOptions("osc"), Target(tmp_path / "osc")).output
    model, tokenizer = quantkit.load(packed), AutoTokenizer.from_pretrained(packed)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert made.shape[1] > prompt.shape[1]
    assert "Paris" in tokenizer.decode(made[0])
