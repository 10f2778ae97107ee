"""Packing on text: whole checkpoints, interrupted and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import UsageError
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.pack.gptq import compensate
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.sequential import Sequential
from quantkit.runtime.load import load
from tests.tiny import calibrate_tiny, save_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
RECIPES = [
    PackOptions("w4a4"),
    PackOptions("w4a4-mx"),
    PackOptions("w4a4-plain"),
    PackOptions("osc", rounding="gptq"),
    PackOptions("nvfp4", rounding="gptq", four_over_six=True),
    PackOptions("w4a4", branch="residual"),
    PackOptions("w4a4", asymmetric=True),
    PackOptions("w4a4-mx", rounding="learned", steps=4),
]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def same(one: Path, two: Path) -> bool:
    a, b = tensors_of(one), tensors_of(two)
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def excess(source: Path, packed: Path) -> float:
    """Mean squared difference of the logits on text that calibration saw."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 256, (8, 64), generator=generator)
    with torch.no_grad():
        exact = load(source, dtype=torch.float32)(input_ids=ids).logits
        found = load(packed, dtype=torch.float32)(input_ids=ids).logits
    return float((found - exact).square().mean())


@pytest.mark.parametrize("options", RECIPES, ids=lambda o: f"{o.scheme}-{o.branch}-{o.rounding}")
def test_deterministic_and_blind_to_global_random_state(
    options: PackOptions, calibrated: Path, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    one = pack(calibrated, options, Target(tmp_path / "one")).output
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    two = pack(calibrated, options, Target(tmp_path / "two")).output
    assert same(one, two)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "depth_register_llama"])
@pytest.mark.parametrize("options", RECIPES[:3], ids=lambda o: o.scheme)
def test_families_load(family: str, options: PackOptions, tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path, family)
    result = pack(source, options, Target(tmp_path / "out"))
    nearest = pack(
        source, PackOptions(options.scheme, rounding="rtn"), Target(tmp_path / "nearest")
    )
    assert result.bits == nearest.bits
    assert excess(source, result.output) < 1.1 * excess(source, nearest.output)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("group", [32, 64])
def test_less_error_than_nearest(name: str, group: int, calibrated: Path, tmp_path: Path) -> None:
    sites = dict.fromkeys(("attn_in", "attn_out", "mlp_in", "mlp_out"), f"{name}+bf16")

    def run(rounding: str) -> float:
        options = PackOptions("mxfp4", group=group, sites=sites, rounding=rounding)
        return excess(calibrated, pack(calibrated, options, Target(tmp_path / rounding)).output)

    assert run("gptq") < run("rtn")


@pytest.mark.parametrize("options", [RECIPES[0], RECIPES[3], RECIPES[-2]], ids=lambda o: o.scheme)
def test_tokens_count_alike_in_what_weights_are_rounded_for(
    options: PackOptions, calibrated: Path, tmp_path: Path
) -> None:
    energies: list[float] = []

    def watched(w: torch.Tensor, hessian: torch.Tensor, *rest: Any, **named: Any) -> Any:
        energies.append(float(hessian.diagonal().mean()))
        return compensate(w, hessian, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.pack.rounding.compensate", watched)
        pack(calibrated, options, Target(tmp_path / "out"))
    assert energies
    assert all(1 <= energy < 4 for energy in energies)


@pytest.mark.parametrize("options", [RECIPES[1], RECIPES[-3], RECIPES[-1]], ids=str)
def test_a_block_is_packed_on_inputs_of_the_packed_model(
    options: PackOptions, calibrated: Path, tmp_path: Path
) -> None:
    """What the run carries from block to block is what the packed checkpoint computes."""
    kept: dict[str, torch.Tensor] = {}

    class Watched(Sequential):
        def _block(self, layer: int) -> str:
            kept["states"] = self.states.get(layer, 0).clone()
            kept["ids"] = self.tokens.ids
            return super()._block(layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.pack.sequential.Sequential", Watched)
        out = pack(calibrated, options, Target(tmp_path / "out")).output
    model = load(out)
    with torch.no_grad():
        hidden = model(input_ids=kept["ids"], output_hidden_states=True).hidden_states[1]
    assert torch.equal(hidden[: len(kept["states"])], kept["states"])


@pytest.mark.parametrize(
    ("options", "at"),
    [
        *((RECIPES[1], at) for at in (("install", 3), ("install", 6), ("forward", 1))),
        (RECIPES[-3], ("install", 6)),
        (RECIPES[-2], ("forward", 12)),
        *((RECIPES[-1], at) for at in (("install", 6), ("forward", 8), ("forward", 19))),
    ],
    ids=lambda x: x.rounding or "gptq" if isinstance(x, PackOptions) else f"{x[0]}-{x[1]}",
)
def test_interrupted_runs_end_with_the_same_bytes(
    options: PackOptions, at: tuple[str, int], calibrated: Path, tmp_path: Path
) -> None:
    whole = pack(calibrated, options, Target(tmp_path / "whole")).output
    name, after = at
    owner, attribute = {
        "install": (Sequential, "_install"),
        "forward": (BlockRunner, "forward"),
    }[name]
    original, calls = getattr(owner, attribute), 0

    def stop(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, stop)
        with pytest.raises(KeyboardInterrupt):
            pack(calibrated, options, Target(tmp_path / "out"))
    assert (tmp_path / "out.partial").exists()
    assert same(whole, pack(calibrated, options, Target(tmp_path / "out")).output)


def test_other_text_is_another_run(calibrated: Path, tmp_path: Path) -> None:
    ids = str(calibrated.parent / "tokens.safetensors") + ":ids"
    few = pack(calibrated, PackOptions("w4a4", data=ids, samples=2), Target(tmp_path / "few"))
    many = pack(calibrated, PackOptions("w4a4"), Target(tmp_path / "many"))
    assert not same(few.output, many.output)
    manifest = open_checkpoint(few.output).manifest
    assert manifest is not None
    assert "2 windows" in manifest.steps[-1].notes["data"]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_asymmetric_gets_closer_to_the_exact_model(family: str, tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path, family)

    def run(asymmetric: bool) -> float:
        options = PackOptions("w4a4-plain", asymmetric=asymmetric)
        return excess(source, pack(source, options, Target(tmp_path / str(asymmetric))).output)

    assert run(True) < 0.9 * run(False)


def test_asymmetric_needs_text(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("w4a4", rounding="rtn", asymmetric=True)
    with pytest.raises(UsageError, match="--asymmetric"):
        pack(calibrated, options, Target(tmp_path / "out"))


def test_no_text_is_said(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="rounds on text"):
        pack(source, PackOptions("mxfp4", rounding="gptq"), Target(tmp_path / "out"))


def test_memory_holds_one_block(calibrated: Path, tmp_path: Path) -> None:
    """Blocks are loaded one at a time, in order, and never twice."""
    loaded = []
    original = BlockRunner.load

    def load_block(self: BlockRunner, i: int, override: Any = None) -> Any:
        loaded.append(i)
        return original(self, i, override)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockRunner, "load", load_block)
        pack(calibrated, PackOptions("w4a4"), Target(tmp_path / "out"))
    source = open_checkpoint(calibrated)
    assert loaded == list(range(describe(source.config, source.tensors).n_layers))
