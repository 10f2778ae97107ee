"""A whole diagnosis of a tiny model: its numbers against definitions and whole-model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.data.tokens import load_tokens
from quantkit.diagnose import run
from quantkit.diagnose.sets import bits_of
from quantkit.evaluate.perplexity import negative_log_likelihood
from quantkit.model.families import describe
from quantkit.model.sites import KINDS
from quantkit.pack.job import PackOptions, prepare
from quantkit.pack.pack import pack
from quantkit.runtime.load import load
from tests.workspace import Workspace

OPTIONS = run.Options(data="sample", windows=3, seq_len=48, noise_windows=2, device="cpu")


@pytest.fixture
def report(workspace: Workspace) -> dict[str, Any]:
    return run.diagnose("model-calibrated", OPTIONS)


def test_sets_agree_with_packed_models(report: dict[str, Any], workspace: Workspace) -> None:
    ids = load_tokens("sample", Path("model"), samples=3, seq_len=48, held_out=True).ids
    plain = float(negative_log_likelihood(load("model"), ids).double().mean())
    whole = _packed(workspace, "whole", {}, ids)
    assert report["plain"]["nll"] == pytest.approx(plain, abs=1e-4)
    assert report["rounded"]["excess_nll"] == pytest.approx(whole - plain, abs=1e-3)
    named = {each["name"]: each for each in report["sets"]}
    for kind in KINDS:
        spared = _packed(workspace, f"no-{kind}", {kind: "bf16"}, ids)
        assert named[kind]["remove"]["excess_nll"] == pytest.approx(whole - spared, abs=1e-3)
        others = {other: "bf16" for other in KINDS if other != kind}
        alone = _packed(workspace, f"only-{kind}", others, ids)
        assert named[kind]["add"]["excess_nll"] == pytest.approx(alone - plain, abs=1e-3)
    assert set(named) == {*KINDS, "readers", "generators", "layer 0", "layer 1"}


def _packed(workspace: Workspace, name: str, sites: dict[str, str], ids: torch.Tensor) -> float:
    output = pack("model-calibrated", PackOptions("mxfp4", sites=sites), Target(Path(name))).output
    return float(negative_log_likelihood(load(output), ids).double().mean())


def test_bits_are_those_of_a_packed_checkpoint(workspace: Workspace) -> None:
    source = open_checkpoint("model-calibrated")
    layout = describe(source.config, source.tensors)
    for n, options in enumerate(
        (
            PackOptions("mxfp4"),
            PackOptions("nvfp4"),
            PackOptions("mxfp8"),
            PackOptions("osc"),
            PackOptions("osc", mlp_out="mxfp4"),
        )
    ):
        output = pack("model-calibrated", options, Target(Path(f"p{n}"))).output
        counted = bits_of(layout, prepare(source, options))
        assert counted == pytest.approx(
            inspect(open_checkpoint(output))["bits_per_weight"], abs=1e-3
        )


def test_views_follow_their_definitions(report: dict[str, Any], workspace: Workspace) -> None:
    ids = load_tokens("sample", Path("model"), samples=3, seq_len=48, held_out=True).ids
    model, seen = load("model"), {}
    for n, layer in enumerate(model.model.layers):
        for kind, module in (
            ("attn_in", layer.self_attn.q_proj),
            ("mlp_out", layer.mlp.down_proj),
        ):
            module.register_forward_pre_hook(_keep(seen, f"layers.{n}.{kind}"))
    for row in ids:
        with torch.no_grad():
            model(input_ids=row[None])
    views = {view["key"]: view for view in report["sites"]}
    assert len(views) == 8
    for key, parts in seen.items():
        x = torch.cat(parts).double()
        centred = x - x.mean(0)
        kurtosis = centred.pow(4).mean(0) / centred.pow(2).mean(0) ** 2 - 3
        absmax = x.abs().amax(0)
        blocks = x.unflatten(-1, (-1, 32))
        crest = (blocks.abs().amax(-1) / blocks.square().mean(-1).sqrt()).mean()
        view = views[key]
        assert view["tokens"] == len(x)
        assert view["kurtosis"] == pytest.approx(float(kurtosis.max()), rel=1e-3)
        assert view["severity"] == pytest.approx(float(absmax.max() / absmax.median()), rel=1e-4)
        assert view["crest"] == pytest.approx(float(crest), rel=1e-4)
        assert view["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)


def _keep(seen: dict[str, list[torch.Tensor]], key: str) -> Any:
    return lambda _, inputs: seen.setdefault(key, []).append(inputs[0].flatten(0, -2))


def test_the_norm_bound_holds(report: dict[str, Any]) -> None:
    used = {v["kind"]: v["bound_use"] for v in report["sites"]}
    assert used["attn_out"] is None
    assert used["mlp_out"] is None
    for view in report["sites"]:
        if view["bound_use"] is not None:
            assert 0.3 < view["bound_use"] <= 1 + 1e-5


def test_slope_of_a_power_law() -> None:
    points = [{"sigma": s, "excess_nll": 3 * s**1.7, "stderr": 0.0} for s in (0.01, 0.1, 0.3)]
    assert run.slope(points) == pytest.approx(1.7)
    hidden = [{"sigma": 0.001, "excess_nll": 5.0, "stderr": 4.0}, *points]
    assert run.slope(hidden) == pytest.approx(1.7)
    assert run.slope(points[:1]) is None


def test_the_frontier_is_what_nothing_beats(report: dict[str, Any]) -> None:
    points = report["pareto"]
    assert {p["name"] for p in points} >= {"mxfp4", "nvfp4", "mxfp8", "osc", "mxfp4, mlp_in bf16"}
    for point in points:
        beaten = any(
            other["bits"] <= point["bits"] and other["excess_nll"] < point["excess_nll"]
            for other in points
        )
        assert point["frontier"] == (not beaten)


def test_a_packed_checkpoint_stands_for_its_source(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run.unpacked(open_checkpoint("model-osc"))
    assert source.path.name == "model"
    assert "is packed: diagnosing" in capsys.readouterr().err


def test_quick_leaves_the_layers_out(workspace: Workspace) -> None:
    quick = run.Options(**{**OPTIONS.__dict__, "quick": True, "windows": 2})
    report = run.diagnose("model-calibrated", quick)
    assert {each["group"] for each in report["sets"]} == {"kind", "role"}


def test_before_and_after_a_transform(workspace: Workspace) -> None:
    from quantkit.checkpoint.step import begin_step

    with begin_step(
        "rotate", "model-calibrated", options={}, suffix="rotated", target=Target(Path("turned"))
    ) as step:
        step.writer.keep_rest()
        step.finish()
    quick = run.Options(**{**OPTIONS.__dict__, "quick": True, "windows": 2})
    report = run.diagnose("turned", quick)
    (before,) = report["compared"]
    assert Path(before["checkpoint"]).name == "model"
    errors = report["local_error"]["mxfp4"]
    assert before["local_error"]["mxfp4"] == pytest.approx(errors, rel=1e-6)
    assert all(0.001 < error < 1 for error in errors)
