"""One pass for many arrangements equals a run of the whole model for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.diagnose import packing, sweep
from quantkit.diagnose.switches import PLAIN, Noise
from quantkit.evaluate.perplexity import negative_log_likelihood
from quantkit.formats import mxfp4
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import Site
from quantkit.pack.job import PackOptions, prepare
from quantkit.pack.pack import pack
from quantkit.runtime.load import load
from tests.tiny import VOCAB, save_tiny, tiny_model

SITES = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (3, 48), generator=torch.Generator().manual_seed(0))


def runner_of(folder: Path) -> BlockRunner:
    checkpoint = open_checkpoint(folder)
    return BlockRunner(checkpoint, describe(checkpoint.config, checkpoint.tensors))


def brute_force(family: str, chosen: set[tuple[int, str]], **changes: Any) -> Tensor:
    """The whole model with MXFP4 at the chosen (layer, kind), by hooks and changed weights."""
    model = tiny_model(family, **changes)
    for layer, kind in chosen:
        for name in SITES[kind]:
            linear = model.get_submodule(f"model.layers.{layer}.{name}")
            linear.weight.data = mxfp4.fake_quantize(linear.weight.data)
            linear.register_forward_pre_hook(lambda _, args: (mxfp4.fake_quantize(args[0]),))
    return negative_log_likelihood(model, tokens())


def arrangement(chosen: set[tuple[int, str]]) -> sweep.Arrangement:
    return lambda site: "mxfp4" if (site.layer, site.kind) in chosen else PLAIN


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=4)


def sets() -> dict[str, set[tuple[int, str]]]:
    every = {(layer, kind) for layer in range(4) for kind in SITES}
    found: dict[str, set[tuple[int, str]]] = {"plain": set(), "all": every}
    for kind in SITES:
        found[f"add {kind}"] = {(layer, k) for layer, k in every if k == kind}
        found[f"remove {kind}"] = {(layer, k) for layer, k in every if k != kind}
    for n in range(4):
        found[f"add {n}"] = {(layer, k) for layer, k in every if layer == n}
        found[f"remove {n}"] = {(layer, k) for layer, k in every if layer != n}
    return found


def test_every_set_agrees_with_brute_force(llama: Path) -> None:
    runner = runner_of(llama)
    rounder = packing.rounder({"mxfp4": prepare(open_checkpoint(llama), PackOptions("mxfp4"))})
    chosen = sets()
    swept = sweep.sweep(
        runner, tokens(), {name: arrangement(s) for name, s in chosen.items()}, rounder
    )
    for name, members in chosen.items():
        exact = brute_force("llama", members, num_hidden_layers=4)
        difference = float(swept.losses[name].double().mean() - exact.double().mean())
        assert abs(difference) < 1e-3, name
        torch.testing.assert_close(swept.losses[name], exact, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(swept.losses["all"], swept.losses["plain"], atol=1e-3)


def test_what_is_shared_is_computed_once(llama: Path) -> None:
    layout = runner_of(llama).layout
    chosen = sets()
    paths = sweep.histories(layout, {name: arrangement(s) for name, s in chosen.items()})
    runs = [len(set(at.values())) for at in paths]
    # The 18 sets are 18 different runs in the last layer only; before, "remove 3" is "all",
    # "add 3" is "plain", and "add 1" and "remove 0" still are one.
    assert runs == [10, 12, 16, 18]


def test_drift_starts_where_the_rounding_does(llama: Path) -> None:
    rounder = packing.rounder({"mxfp4": prepare(open_checkpoint(llama), PackOptions("mxfp4"))})
    late = {(3, kind) for kind in SITES}
    swept = sweep.sweep(
        runner_of(llama),
        tokens(),
        {"plain": arrangement(set()), "late": arrangement(late)},
        rounder,
        drift_of=["late"],
    )
    assert swept.drift["late"][:3] == [0, 0, 0]
    assert swept.drift["late"][3] > 0.001


def test_noise_is_the_same_each_time_and_grows_with_sigma(llama: Path) -> None:
    runner = runner_of(llama)
    spreads = {site.key: torch.ones(site.width) for site in runner.layout.sites}

    def noisy(sigma: float) -> sweep.Arrangement:
        def mode(site: Site) -> Noise | None:
            return Noise(sigma) if site.kind == "mlp_in" else PLAIN

        return mode

    plans = {str(sigma): noisy(sigma) for sigma in (0.0, 0.01, 0.3)}
    nothing = packing.rounder({})
    first = sweep.sweep(runner, tokens(), plans, nothing, spreads=spreads).losses
    again = sweep.sweep(runner, tokens(), plans, nothing, spreads=spreads).losses
    plain = brute_force("llama", set(), num_hidden_layers=4)
    torch.testing.assert_close(first["0.0"], plain, rtol=1e-4, atol=1e-4)
    for name in plans:
        assert torch.equal(first[name], again[name])
    small, large = ((first[n] - plain).abs().mean() for n in ("0.01", "0.3"))
    assert 0 < float(small) < float(large)


def test_a_mixture_of_experts_equals_the_packed_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "moe", "qwen3_moe")
    options = PackOptions("mxfp4")
    packed = pack(folder, options, Target(tmp_path / "packed")).output
    plans: dict[str, sweep.Arrangement] = {
        "plain": lambda site: PLAIN,
        "experts": lambda site: "mxfp4" if site.kind == "mlp_out" else PLAIN,
        "all": lambda site: "mxfp4",
    }
    rounder = packing.rounder({"mxfp4": prepare(open_checkpoint(folder), options)})
    swept = sweep.sweep(runner_of(folder), tokens(), plans, rounder).losses
    plain = negative_log_likelihood(tiny_model("qwen3_moe"), tokens())
    torch.testing.assert_close(swept["plain"], plain, rtol=1e-4, atol=1e-4)
    whole = negative_log_likelihood(load(packed), tokens())
    torch.testing.assert_close(swept["all"], whole, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(swept["experts"], plain, atol=1e-3)
    assert not torch.allclose(swept["experts"], swept["all"], atol=1e-3)
