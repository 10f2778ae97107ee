"""A real model (QUANTKIT_TEST_MODEL): every set of a diagnosis against a run of the whole model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantkit.data.tokens import load_tokens
from quantkit.diagnose import run
from quantkit.evaluate.perplexity import negative_log_likelihood
from quantkit.formats import mxfp4
from quantkit.runtime.load import load
from tests.diagnose.test_sweep import SITES

MODEL = os.environ.get("QUANTKIT_TEST_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MODEL is None, reason="QUANTKIT_TEST_MODEL names no model"),
    pytest.mark.usefixtures("elsewhere"),
]
KINDS = {
    **{kind: (kind,) for kind in SITES},
    "readers": ("attn_in", "mlp_in"),
    "generators": ("attn_out", "mlp_out"),
}


@contextmanager
def rounded(model: Any, chosen: set[tuple[int, str]]) -> Iterator[None]:
    """Weights and inputs of the chosen (layer, kind) in MXFP4, for a while."""
    hooks, weights = [], []
    for layer, kind in sorted(chosen):
        for name in SITES[kind]:
            linear = model.get_submodule(f"model.layers.{layer}.{name}")
            weights.append((linear, linear.weight.data))
            linear.weight.data = mxfp4.fake_quantize(linear.weight.data)
            hook = lambda _, args: (mxfp4.fake_quantize(args[0]),)  # noqa: E731
            hooks.append(linear.register_forward_pre_hook(hook))
    yield
    for linear, weight in weights:
        linear.weight.data = weight
    for handle in hooks:
        handle.remove()


def test_every_set_agrees_with_brute_force() -> None:
    assert MODEL is not None
    options = run.Options(data="sample", windows=2, seq_len=256, noise_windows=1, device="cpu")
    report = run.diagnose(MODEL, options)
    ids = load_tokens("sample", Path(MODEL), samples=2, seq_len=256, held_out=True).ids
    model = load(MODEL)
    layers = range(model.config.num_hidden_layers)
    every = {(layer, kind) for layer in layers for kind in SITES}

    def loss(chosen: set[tuple[int, str]]) -> float:
        with rounded(model, chosen):
            return float(negative_log_likelihood(model, ids).double().mean())

    plain, whole = loss(set()), loss(every)
    assert report["rounded"]["excess_nll"] == pytest.approx(whole - plain, abs=1e-3)
    sets = {
        **{name: {(at, k) for at, k in every if k in kinds} for name, kinds in KINDS.items()},
        **{f"layer {n}": {(at, k) for at, k in every if at == n} for n in layers},
    }
    found = {each["name"]: each for each in report["sets"]}
    assert set(found) == set(sets)
    for name, members in sets.items():
        added, removed = loss(members) - plain, whole - loss(every - members)
        assert found[name]["add"]["excess_nll"] == pytest.approx(added, abs=1e-3), name
        assert found[name]["remove"]["excess_nll"] == pytest.approx(removed, abs=1e-3), name
