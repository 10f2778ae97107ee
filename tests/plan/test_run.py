"""A plan as a user makes it: within its budget, what pack then writes, and as measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.measure import sizes
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.evaluate.perplexity import compare, negative_log_likelihood
from quantkit.model.families import describe
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.site_plan import load_site_plan
from quantkit.plan.run import Options, plan
from quantkit.runtime.load import load
from tests.tiny import calibrate_tiny

QUICK = {"samples": 2, "windows": 4}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_tiny(
        tmp_path_factory.mktemp("plan"), hidden_size=128, intermediate_size=256, head_dim=32
    )


@pytest.fixture(scope="module")
def made(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("made") / "plan.json"
    return output, plan(calibrated, Options(bits=5.1, **QUICK), output)


def test_pack_writes_what_was_planned(
    calibrated: Path,
    made: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path, report = made
    done = pack(calibrated, PackOptions("plan", plan=str(path)), Target(tmp_path / "packed"))
    assert report["bits"] <= 5.1
    assert sizes(open_checkpoint(done.output)).linear_bits == pytest.approx(
        report["bits"], abs=1e-9
    )
    # and its loss is the one in the report, on the same windows
    from safetensors.torch import load_file

    ids = load_file(calibrated.parent / "tokens.safetensors")["ids"][-4:]
    original = load(calibrated)
    plain = negative_log_likelihood(original, ids)
    packed = negative_log_likelihood(load(done.output), ids)
    assert compare(plain, packed).mean == pytest.approx(report["excess_nll"], abs=1e-3)
    manifest = open_checkpoint(done.output).manifest
    assert manifest is not None
    assert manifest.steps[-1].plan_digest == _read(path, calibrated).digest


def _read(path: Path, folder: Path) -> Any:
    source = open_checkpoint(folder)
    return load_site_plan(path, source, describe(source.config, source.tensors))


def test_the_chosen_plan_is_the_best_within_the_budget(made: tuple[Path, dict[str, Any]]) -> None:
    _, report = made
    within = [p for p in report["pareto"] if p["bits"] <= 5.1]
    assert {"all nvfp4", "by site, 5.1 bits"} <= {p["name"] for p in within}
    assert report["excess_nll"] == min(p["excess_nll"] for p in within)
    assert [p["bits"] for p in report["pareto"]] == sorted(p["bits"] for p in report["pareto"])
    front = [p["excess_nll"] for p in report["pareto"] if p["frontier"]]
    assert front == sorted(front, reverse=True)


def test_bits_spent_by_site_are_expected_to_help(made: tuple[Path, dict[str, Any]]) -> None:
    _, report = made
    by_site = next(p for p in report["pareto"] if p["name"] == "by site, 5.1 bits")
    assert by_site["bits"] > 5.0
    for point in report["pareto"]:
        if point["bits"] <= by_site["bits"]:
            assert by_site["expected"] <= point["expected"]


def test_a_limit_on_the_loss_takes_the_cheapest_plan_that_keeps_it(
    calibrated: Path, tmp_path: Path
) -> None:
    report = plan(calibrated, Options(max_drop=0.05, **QUICK), tmp_path / "plan.json")
    assert report["excess_nll"] <= 0.05
    cheaper = [p for p in report["pareto"] if p["bits"] < report["bits"]]
    assert all(p["excess_nll"] > 0.05 for p in cheaper)


def test_formats_can_be_limited_and_sites_spared(calibrated: Path, tmp_path: Path) -> None:
    options = Options(bits=9.0, formats=("mxfp4", "bf16"), **QUICK)
    report = plan(calibrated, options, tmp_path / "plan.json")
    names = {p["name"].split(",")[0].split(" +")[0] for p in report["pareto"]}
    assert "all nvfp4" not in names
    formats = _read(tmp_path / "plan.json", calibrated).formats.values()
    assert {f and f.weights for f in formats} <= {None, "mxfp4"}


def test_what_cannot_be_is_said_before_anything_is_measured(
    calibrated: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    for options, words in (
        (Options(), "--bits or --max-drop"),
        (Options(bits=5, max_drop=0.1), "--bits or --max-drop"),
        (Options(bits=5, formats=("fp3",)), "fp3"),
        (Options(bits=5, windows=100), "windows"),
    ):
        with pytest.raises(UsageError, match=words):
            plan(calibrated, options, output)
    with pytest.raises(UsageError, match=r"the least here is 4\.25"):
        plan(calibrated, Options(bits=4, **QUICK), output)
    assert not output.exists()
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        plan(calibrated, Options(bits=5, **QUICK), output)


def test_a_plan_for_other_weights_or_with_options_that_contradict_it_is_refused(
    made: tuple[Path, dict[str, Any]], calibrated: Path, tmp_path: Path
) -> None:
    path, _ = made
    target = Target(tmp_path / "packed")
    other = calibrate_tiny(tmp_path, "qwen2")
    with pytest.raises(InputRejected, match="other weights"):
        pack(other, PackOptions("plan", plan=str(path)), target)
    for options in (
        PackOptions("mxfp4", plan=str(path)),
        PackOptions("plan", plan=str(path), sites={"mlp_out": "bf16"}),
        PackOptions("plan", plan=str(path), hadamard=32),
    ):
        with pytest.raises(UsageError, match="--plan decides"):
            pack(calibrated, options, target)
    with pytest.raises(InputRejected, match="no such plan"):
        pack(calibrated, PackOptions("plan", plan=str(tmp_path / "none.json")), target)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["sites"].popitem(),
        lambda data: data["sites"].update({"layers.9.attn_in": None}),
        lambda data: data.update(scale_rule="up"),
        lambda data: data.update(kind="other"),
        lambda data: next(iter(data["sites"].values())).update(channels=[5, 3]),
        lambda data: next(iter(data["sites"].values())).update(branch="bf16"),
        lambda data: next(iter(data["sites"].values())).update(weights="fp3"),
        lambda data: next(iter(data["sites"].values())).update(
            branch="bf16", outliers=16, channels=[100000]
        ),
        lambda data: next(iter(data["sites"].values())).update(
            branch="bf16", outliers=999984, channels=[1]
        ),
    ],
)
def test_damaged_plans_are_refused(
    made: tuple[Path, dict[str, Any]], calibrated: Path, tmp_path: Path, damage: Any
) -> None:
    data = json.loads(made[0].read_text())
    damage(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputRejected):
        _read(path, calibrated)


def test_a_killed_run_continues(calibrated: Path, tmp_path: Path) -> None:
    line = ["plan", str(calibrated), "--bits", "5.1", "--samples", "2", "--windows", "4", "-q"]
    command = [sys.executable, "-m", "quantkit", *line, "-o", str(tmp_path / "plan.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    partial = tmp_path / "plan.json.partial"
    until = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < until and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = json.loads(partial.read_text())
    assert kept["costs"]
    # what was kept is used: a number changed there shows in the result
    key = next(iter(kept["costs"]))
    kept["costs"][key] = dict.fromkeys(kept["costs"][key], 1e6)
    partial.write_text(json.dumps(kept))
    again = [*command[:-3], "--json", *command[-2:]]
    done = subprocess.run(again, env=environment, text=True, capture_output=True, check=True)
    report = json.loads(done.stdout)
    assert f"continuing {partial}" in done.stderr
    assert report["pareto"][0]["expected"] >= 1e6
    assert not partial.exists()


def test_a_plan_with_rounding_by_gptq_and_no_rounding_at_all(
    made: tuple[Path, dict[str, Any]],
    calibrated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(made[0])
    gptq = pack(calibrated, PackOptions("plan", plan=path, rounding="gptq"), Target(Path("gptq")))
    assert gptq.bits["all"] == pytest.approx(made[1]["bits"], abs=1e-9)
    exact = pack(calibrated, PackOptions("plan", plan=path, dtype="float32"), Target(Path("exact")))
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        before = load(calibrated, dtype=torch.float32)(ids).logits
        after = load(exact.output, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
