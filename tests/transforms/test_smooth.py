"""Smoothing on disk: the same function, statistics that follow, and never a larger error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.calibrate import store
from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.checkpoint.manifest import read_manifest
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import ModelLayout, read_weight
from quantkit.outliers.choose import choose
from quantkit.outliers.plan import FILE as PLAN
from quantkit.outliers.plan import load_plan
from quantkit.transforms.decide import Method, decide
from quantkit.transforms.equivalence import difference, logits
from quantkit.transforms.learned import Training
from quantkit.transforms.observe import Observed, observe
from quantkit.transforms.rotate import RotateOptions, rotate_checkpoint
from quantkit.transforms.simulate import Simulation, output_error
from quantkit.transforms.smooth import REPORT, SmoothOptions, smooth
from tests.tiny import save_tiny
from tests.transforms.families import FAMILIES, tokens

FLOAT64, FLOAT32 = 1e-9, 1e-4
SHORT = Training(steps=20, batch=64, check_every=10)


def calibrated(source: Path, output: Path, data: Path) -> Path:
    options = Options(data=f"{data}:ids", samples=8, device="cpu")
    result = calibrate(source, options, Target(output))
    assert result is not None
    return result.output


def token_file(folder: Path, samples: int = 10, length: int = 64) -> Path:
    path = folder / "tokens.safetensors"
    save_file({"ids": tokens(samples, length)}, path)
    return path


def _layout(path: Path) -> ModelLayout:
    checkpoint = open_checkpoint(path)
    return describe(checkpoint.config, checkpoint.tensors)


def run(source: Path, output: Path, data: Path | None = None, **options: Any) -> Path:
    spec = None if data is None else f"{data}:ids"
    method = options.pop("method", Method("max"))
    chosen = SmoothOptions(method=method, data=spec, samples=10, device="cpu", **options)
    return smooth(source, chosen, Target(output)).output


@pytest.mark.parametrize("name", [*FAMILIES, "gemma2"])
def test_smoothing_keeps_the_function(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES.get(name, (name, {}))
    source = save_tiny(tmp_path / "model", family, torch.float64, **changes)
    data = token_file(tmp_path)
    with_statistics = calibrated(source, tmp_path / "calibrated", data)
    before = logits(source, tokens())
    output = run(with_statistics, tmp_path / "out", method=Method("max", 0.7, check=False))
    assert difference(before, logits(output, tokens())) < FLOAT64
    narrow = logits(output, tokens(), torch.float32)
    assert difference(logits(source, tokens(), torch.float32), narrow) < FLOAT32
    report = json.loads((output / REPORT).read_text())
    layout = _layout(source)
    measured = store.load_statistics(open_checkpoint(with_statistics))
    assert set(report) == {site.key for site in layout.sites}
    for key, entry in report.items():
        assert entry["how"] == ("max" if measured.has(key) else "too few tokens")
    unchanged = {n for n in open_checkpoint(source).names() if _same(source, output, n)}
    # Only the embedding, the head and what feeds no site may stay as it was.
    assert not [n for n in unchanged if n.endswith("proj.weight") and "experts" not in n]


def _same(a: Path, b: Path, name: str) -> bool:
    return torch.equal(open_checkpoint(a).read(name), open_checkpoint(b).read(name))


@pytest.mark.parametrize("method", ["max", "quantile", "search", "learned"])
@pytest.mark.parametrize("scheme", ["mxfp4", "osc", "int4"])
def test_every_method_keeps_the_function_and_the_error_down(
    method: str, scheme: str, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "model", "llama", torch.float64)
    data = token_file(tmp_path)
    chosen = Method(method, quantile=0.99, training=SHORT)
    output = run(source, tmp_path / "out", data, method=chosen, scheme=scheme, hadamard="32")
    assert difference(logits(source, tokens()), logits(output, tokens())) < FLOAT64
    for key, entry in json.loads((output / REPORT).read_text()).items():
        assert entry["after"] <= entry["before"], key


def test_statistics_follow_the_scales(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen2", torch.float32)
    data = token_file(tmp_path)
    before = calibrated(source, tmp_path / "calibrated", data)
    output = run(before, tmp_path / "out", sites=("attn_in", "mlp_out"), method=_unchecked())
    again = calibrated(output, tmp_path / "again", data)
    carried = store.load_statistics(open_checkpoint(output))
    measured = store.load_statistics(open_checkpoint(again))
    for key in [site.key for site in _layout(source).sites]:
        for name in ("mean", "abs_mean", "absmax", "tail", "energy", "m2", "m3", "m4"):
            expected = measured.get(key, name)
            atol = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(carried.get(key, name), expected, rtol=1e-4, atol=atol)
        if key.endswith(("attn_in", "mlp_out")):
            with pytest.raises(InputRejected, match="no hits32") as error:
                carried.get(key, "hits32")
            assert error.value.hint == "calibrate again"
        else:
            assert torch.equal(carried.get(key, "hits32"), measured.get(key, "hits32"))


def test_counts_of_group_maxima_are_new_where_tokens_were_run(tmp_path: Path) -> None:
    # Wide enough for groups of 32 to mean something; the same tokens for both, so equal counts.
    source = save_tiny(tmp_path / "model", "llama", torch.float32, intermediate_size=160)
    data = token_file(tmp_path, samples=8)
    before = calibrated(source, tmp_path / "calibrated", data)
    output = run(before, tmp_path / "out", data, method=Method("max", 0.9))
    measured = store.load_statistics(open_checkpoint(calibrated(output, tmp_path / "again", data)))
    carried = store.load_statistics(open_checkpoint(output))
    for site in _layout(source).sites:
        for group in (32, 64, 128):
            for name in (f"hits{group}", f"qualify{group}"):
                a, b = carried.get(site.key, name), measured.get(site.key, name)
                assert (a - b).abs().sum() <= 0.01 * b.sum() + 2, (site.key, name)


def test_a_plan_made_before_smoothing_is_left_out_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    source = save_tiny(tmp_path / "model")
    before = calibrated(source, tmp_path / "calibrated", token_file(tmp_path))
    checkpoint = open_checkpoint(before)
    layout = describe(checkpoint.config, checkpoint.tensors)
    plan = choose(checkpoint, layout.sites, group=32, criterion="mode").encode()
    (before / PLAN).write_bytes(plan)
    output = run(before, tmp_path / "out", method=_unchecked())
    assert "separate-outliers again" in capsys.readouterr().err
    assert not (output / PLAN).exists()
    (output / PLAN).write_bytes(plan)
    with pytest.raises(InputRejected, match="other weights"):
        load_plan(open_checkpoint(output))


def _unchecked() -> Method:
    return Method("max", check=False)


@pytest.mark.parametrize("method", ["max", "quantile", "search", "learned"])
def test_no_site_gets_worse_on_tokens_nobody_saw(method: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", torch.float32)
    data = token_file(tmp_path, samples=20)
    chosen = Method(method, alpha=0.9, quantile=0.99, training=SHORT)
    output = run(source, tmp_path / "out", data, method=chosen, scheme="int4")
    report = json.loads((output / REPORT).read_text())
    fresh = tokens(8, 64, seed=99)
    before, after = _errors(source, fresh), _errors(output, fresh)
    for key, entry in report.items():
        assert entry["after"] <= entry["before"], key
        if entry["how"] == "none":
            assert abs(after[key] - before[key]) < 1e-4, key  # float32 rounding upstream
        else:
            assert after[key] < 1.02 * before[key], key


@pytest.mark.parametrize("method", ["max", "quantile", "search", "learned"])
def test_where_every_rule_hurts_the_site_is_left_alone(method: str, tmp_path: Path) -> None:
    # Every other channel spikes in one token, and only among those that scales are fitted on.
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    site = describe(checkpoint.config, checkpoint.tensors).sites[0]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(512, site.width, generator=generator)
    for channel in range(0, site.width, 2):
        x[2 * channel, channel] = 3000.0
    seen = Observed(site, x[:256], x[256:].clamp(-4, 4))
    chosen = Method(method, quantile=0.9999, training=replace(SHORT, learning_rate=10.0))
    simulation = Simulation("int4", "int4")
    found = decide(checkpoint, site, chosen, simulation, observed=seen, statistics=None)
    assert found.before is not None
    assert found.after is not None
    assert found.after <= found.before
    if method in ("max", "quantile"):
        assert found.scale is None
        unchecked = replace(chosen, check=False)
        spoiled = decide(checkpoint, site, unchecked, simulation, observed=seen, statistics=None)
        w = torch.cat([read_weight(checkpoint, linear) for linear in site.linears])
        worse = output_error(seen.held, w, simulation, spoiled.scale)[1]
        assert worse > 1.5 * found.before


def _errors(path: Path, ids: torch.Tensor) -> dict[str, float]:
    """The INT4 output error of every site on tokens of its own."""
    checkpoint = open_checkpoint(path)
    layout = describe(checkpoint.config, checkpoint.tensors)
    runner = BlockRunner(checkpoint, layout)
    found = {}
    for _, inputs in observe(runner, ids, lambda site: True, layout.n_layers - 1):
        for seen in inputs:
            w = torch.cat([read_weight(checkpoint, linear) for linear in seen.site.linears])
            x = torch.cat([seen.fit, seen.held])
            found[seen.site.key] = output_error(x, w, Simulation("int4", "int4"))[1]
    return found


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", num_hidden_layers=3)
    data = token_file(tmp_path)
    arguments = [sys.executable, "-m", "quantkit", "smooth", str(source), "--data", f"{data}:ids"]
    arguments += ["--method", "learned", "--steps", "60", "--batch", "256", "--samples", "10"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start(output: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*arguments, "-o", str(output)],
            env=environment,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = tmp_path / "whole"
    assert start(whole).wait() == 0
    killed = tmp_path / "killed"
    process = start(killed)
    scratch = tmp_path / "killed.partial" / "scratch"
    deadline = time.monotonic() + 60
    while len(list(scratch.glob("*.safetensors"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    resumed = start(killed)
    _, said = resumed.communicate()
    assert resumed.returncode == 0, said
    assert "continuing" in said
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_stored_dtype_and_manifest(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", torch.bfloat16)
    data = token_file(tmp_path)
    output = run(source, tmp_path / "kept", data)
    assert {t.dtype for t in open_checkpoint(output).tensors.values()} == {torch.bfloat16}
    wide = run(source, tmp_path / "wide", data, dtype="float64")
    assert difference(logits(source, tokens()), logits(wide, tokens())) < FLOAT64
    manifest = read_manifest(wide)
    assert manifest is not None
    assert manifest.steps[-1].options["method"] == "max"
    assert manifest.steps[-1].notes["sites"] == 8


@pytest.mark.parametrize(
    "options",
    [
        {"method": Method("best")},
        {"method": Method(alpha=1.5)},
        {"method": Method(quantile=0.1)},
        {"sites": ("mlp",)},
        {"scheme": "int3"},
        {"hadamard": "some"},
        {"dtype": "int8"},
        {"method": _unchecked()},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    with pytest.raises(UsageError):
        run(source, tmp_path / "out", token_file(tmp_path), **options)
    assert not (tmp_path / "out").exists()


def test_stale_statistics_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    before = calibrated(source, tmp_path / "calibrated", token_file(tmp_path))
    other = save_tiny(tmp_path / "other", seed=5)
    (other / store.FILE).write_bytes((before / store.FILE).read_bytes())
    with pytest.raises(InputRejected, match="other weights") as error:
        run(other, tmp_path / "out", method=_unchecked())
    assert "quantkit calibrate" in str(error.value.hint)


def test_the_loss_has_the_hadamard_that_will_follow(tmp_path: Path) -> None:
    # On 64 channels a Hadamard of 32 changes every error; recorded or not it must be the same one.
    source = save_tiny(tmp_path / "model")
    data = token_file(tmp_path)
    rotate_checkpoint(source, RotateOptions(block=32), Target(tmp_path / "rotated"))
    method = Method("max")
    reports = []
    for name, start, asked in (
        ("a", source, "auto"),
        ("b", tmp_path / "rotated", "auto"),
        ("c", source, "32"),
        ("d", source, "none"),
        ("e", source, "recorded"),
    ):
        output = run(start, tmp_path / name, data, method=method, hadamard=asked)
        reports.append((output / REPORT).read_text())
    assert reports[0] == reports[1] == reports[2]
    assert reports[3] == reports[4] != reports[0]


def test_defaults_are_valid() -> None:
    assert replace(SmoothOptions(), samples=2).method.check
