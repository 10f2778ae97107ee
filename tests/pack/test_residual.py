"""Packing with a residual branch: bytes, bits, rounding, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.formats import FORMATS, mxfp4
from quantkit.kernels import reference
from quantkit.outliers.separate import separate_outliers
from quantkit.pack.job import PackOptions, prepare
from quantkit.pack.pack import pack
from quantkit.pack.preview import preview
from quantkit.pack.rounding import round_for_inputs, round_weight
from quantkit.pack.scheme import SiteFormat, from_json
from quantkit.pack.separate import extended
from quantkit.pack.site_plan import SitePlan, load_site_plan
from tests.pack.test_gptq import correlated, output_error, weight
from tests.pack.test_sequential import excess, same
from tests.tiny import calibrate_tiny
from tests.workspace import Shell

pytestmark = pytest.mark.usefixtures("elsewhere")
Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"
OSC = PackOptions("osc", branch="residual", mlp_out="mxfp4")
NV = PackOptions("nvfp4", branch="residual", branch_bits=1.2)


def test_the_appended_columns_are_copies(calibrated: Path, tmp_path: Path) -> None:
    packed = open_checkpoint(pack(calibrated, OSC, Target(tmp_path / "out")).output)
    source = open_checkpoint(calibrated)
    for name in (Q0, DOWN1):
        w, index = source.read(f"{name}.weight"), packed.read(f"{name}.outlier_index")
        channels = index[index >= 0].long()
        assert 0 < len(channels) < 32 == len(index)
        columns = torch.zeros(len(w), 32, dtype=w.dtype)
        columns[:, : len(channels)] = w[:, channels]
        codes, scale = mxfp4.quantize(torch.cat([w, columns], 1))
        assert torch.equal(packed.read(f"{name}.weight_packed"), codes)
        assert torch.equal(packed.read(f"{name}.weight_scale"), scale)
        assert f"{name}.outlier_weight" not in packed.tensors


@pytest.mark.parametrize("options", [OSC, NV], ids=["mxfp4", "nvfp4"])
def test_bits_count_the_appended_columns(
    options: PackOptions, calibrated: Path, tmp_path: Path
) -> None:
    foretold = {
        row["kind"]: row["bits"] for row in preview(calibrated, options, Target())[0]["kinds"]
    }
    result = pack(calibrated, options, Target(tmp_path / "out"))
    packed = open_checkpoint(result.output)
    source = open_checkpoint(calibrated)
    scheme = from_json(packed.config["quantization_config"])
    fmt = scheme.sites["mlp_out"]
    assert fmt is not None
    assert fmt.branch == "residual"
    out, width = source.tensors[f"{DOWN1}.weight"].shape
    once = 32 * fmt.outliers + (64 if fmt.weights == "nvfp4" else 0)  # index, global scales
    bits = FORMATS[fmt.weights].bits * (width + fmt.outliers) / width + once / (out * width)
    assert result.bits["mlp_out"] == pytest.approx(bits, rel=1e-12)
    assert foretold == pytest.approx({k: v for k, v in result.bits.items() if k != "all"})
    shown = inspect(packed)
    assert shown["sites"][3]["format"] == f"{fmt.weights} + residual branch"
    names = [n for n in source.names() if n.endswith("_proj.weight")]
    weights = sum(source.tensors[n].shape[0] * source.tensors[n].shape[1] for n in names)
    assert sum(site["weights"] for site in shown["sites"]) == weights


def test_the_budget_pays_for_columns_of_the_main_format(tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path, hidden_size=512, intermediate_size=1024, head_dim=128)
    for scheme, columns in (("nvfp4", (16, 48)), ("mxfp4", (32, 32))):
        options = PackOptions(scheme, branch="residual", branch_bits=0.25)
        result = pack(source, options, Target(tmp_path / scheme))
        kinds = (result.scheme.sites["mlp_in"], result.scheme.sites["mlp_out"])
        assert tuple(fmt.outliers for fmt in kinds if fmt) == columns


def test_gptq_rounds_the_appended_columns_too() -> None:
    x, w = correlated(2000, 64, 0), weight(48, 64, 1)
    channels = torch.tensor([2, 9, 33, 60])
    x[:, channels] *= 4
    fmt = SiteFormat("mxfp4", "mxfp4", "residual", outliers=32)
    operand = reference.input_operand(x, fmt, "even", channels)
    whole = extended(w, channels, fmt)
    assert operand.shape == (2000, 96)
    done = round_for_inputs(whole, None, fmt, operand.T @ operand, "even")
    found = reference.dequantized_weight(done.encode(), fmt)
    nearest = reference.dequantized_weight(round_weight(whole, fmt), fmt)
    assert output_error(operand, whole, found) < 0.8 * output_error(operand, whole, nearest)
    assert not torch.equal(found[:, 64:68], nearest[:, 64:68])
    assert not found[:, 68:].any(), "padding stays zero"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-mx"])
def test_roundings_lower_the_error(family: str, scheme: str, tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path, family)

    def run(rounding: str, **more: bool) -> float:
        options = PackOptions(scheme, branch="residual", rounding=rounding, **more)  # type: ignore
        out = pack(source, options, Target(tmp_path / f"{rounding}{len(more)}")).output
        return excess(source, out)

    nearest = run("rtn")
    assert run("search") < nearest
    gptq = run("gptq")
    assert gptq < 0.9 * nearest
    assert run("gptq", asymmetric=True) < gptq


def test_learned_rounding_starts_from_gptq_and_gets_closer(tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path)

    def run(rounding: str, steps: int | None = None) -> float:
        options = PackOptions("w4a4-mx", branch="residual", rounding=rounding, steps=steps)
        return excess(source, pack(source, options, Target(tmp_path / rounding)).output)

    assert run("learned", 30) < run("gptq")


def test_more_columns_lose_less(calibrated: Path, tmp_path: Path) -> None:
    def run(bits: float) -> float:
        options = PackOptions("nvfp4", branch="residual", branch_bits=bits, rounding="gptq")
        return excess(calibrated, pack(calibrated, options, Target(tmp_path / str(bits))).output)

    assert run(4.5) < 0.6 * run(1.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions("mxfp4", branch="residual"), "no site of mxfp4 has a branch"),
        (PackOptions("osc", branch="rest"), "branch 'rest': one of"),
        (PackOptions("osc", mlp_out="mxfp8+residual"), "4-bit formats, not mxfp8"),
        (PackOptions("osc", branch="residual", hadamard=32), "unrotated input"),
        (PackOptions("nvfp4", branch="residual", branch_bits=9), "between 0 and 8"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: PackOptions, message: str, calibrated: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        pack(calibrated, options, Target(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_rotation_that_does_not_divide_is_one_line(calibrated: Path, tmp_path: Path) -> None:
    for branch in ("residual", "fp8"):
        options = PackOptions("nvfp4", branch=branch, branch_bits=0.3, hadamard=48)
        with pytest.raises(InputRejected, match="a Hadamard of 48 does not divide 64"):
            pack(calibrated, options, Target(tmp_path / "out"))


def test_a_plan_of_groups_serves_a_residual(calibrated: Path, tmp_path: Path) -> None:
    planned = separate_outliers(calibrated, Target(tmp_path / "plan"), group=64).output
    packed = open_checkpoint(pack(planned, OSC, Target(tmp_path / "out")).output)
    plan = json.loads((planned / "outliers.json").read_text())["sites"]["layers.0.attn_in"]
    index = packed.read(f"{Q0}.outlier_index")
    assert index.tolist() == plan + [-1] * (32 - len(plan))


def test_a_site_plan_says_the_same(calibrated: Path, tmp_path: Path) -> None:
    source = open_checkpoint(calibrated)
    job = prepare(source, NV)
    plan = SitePlan(
        {site.key: job.format(site) for site in job.layout.sites},
        {key: tuple(found.tolist()) for key, found in job.channels.items()},
        "even",
        source.weights_digest(),
    )
    (tmp_path / "plan.json").write_bytes(plan.encode())
    assert load_site_plan(tmp_path / "plan.json", source, job.layout).formats == plan.formats
    planned = PackOptions("plan", plan=str(tmp_path / "plan.json"))
    one = pack(calibrated, planned, Target(tmp_path / "one")).output
    assert same(one, pack(calibrated, NV, Target(tmp_path / "two")).output)
    broken = (tmp_path / "plan.json").read_text().replace('"outliers": 16', '"outliers": 32')
    (tmp_path / "plan.json").write_text(broken)
    with pytest.raises(InputRejected, match="not a plan"):
        pack(calibrated, planned, Target(tmp_path / "three"))


def test_the_command_line(calibrated: Path, tmp_path: Path, shell: Shell) -> None:
    out = str(tmp_path / "out")
    at = [str(calibrated), "--scheme", "w4a4", "--branch", "residual", "--rounding", "rtn"]
    done = shell("pack", *at, "-o", out)
    assert done.code == 0
    assert "nvfp4 + residual branch" in done.out
    refused = shell("pack", *at[:2], "mxfp8", *at[3:], "--branch-bits", "1", "-o", f"{out}2")
    assert refused.code == 2
    assert "residual branch extends 4-bit formats" in refused.err
    assert "Traceback" not in refused.err
