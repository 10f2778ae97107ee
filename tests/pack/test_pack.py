"""Packing whole checkpoints: bytes, plans, statistics, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.calibrate.store import load_statistics
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.formats import e8m0, mxfp4, mxfp8, nvfp4
from quantkit.outliers.plan import FILE as PLAN
from quantkit.outliers.plan import load_plan
from quantkit.outliers.separate import separate_outliers
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.preview import preview
from quantkit.pack.scheme import from_json
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def test_mxfp4_packs_every_linear_and_nothing_else(calibrated: Path, tmp_path: Path) -> None:
    result = pack(calibrated, PackOptions("mxfp4", scale_rule="rceil"), Target(tmp_path / "out"))
    source, packed = open_checkpoint(calibrated), open_checkpoint(result.output)
    assert result.linears == 14
    assert result.bits["all"] == 4.25
    for name in source.names():
        if name.endswith("_proj.weight"):
            base = name.removesuffix(".weight")
            codes, scale = mxfp4.quantize(source.read(name), "rceil")
            assert torch.equal(packed.read(f"{base}.weight_packed"), codes)
            assert torch.equal(packed.read(f"{base}.weight_scale"), scale)
            assert name not in packed.tensors
        else:
            assert torch.equal(packed.read(name), source.read(name))
    assert packed.manifest is not None
    step = packed.manifest.steps[-1]
    assert (step.verb, step.options["scale_rule"]) == ("pack", "rceil")
    assert (result.output / "tokenizer.json").exists()
    assert not (result.output / "statistics.safetensors").exists()


def test_nvfp4_shares_the_divisor_of_a_fused_group(calibrated: Path, tmp_path: Path) -> None:
    result = pack(calibrated, PackOptions("nvfp4"), Target(tmp_path / "out"))
    source, packed = open_checkpoint(calibrated), open_checkpoint(result.output)
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    weights = [source.read(f"{name}.weight") for name in names]
    divisor = packed.read(f"{names[0]}.weight_global_scale")
    exact = nvfp4.global_scale(torch.cat(weights).abs().amax())
    assert divisor <= exact < 2 * divisor
    assert divisor.log2() == divisor.log2().round()
    for name, weight in zip(names, weights, strict=True):
        codes, scale, _ = nvfp4.quantize(weight, divisor)
        assert torch.equal(packed.read(f"{name}.weight_global_scale"), divisor)
        assert torch.equal(packed.read(f"{name}.weight_packed"), codes)
        assert torch.equal(packed.read(f"{name}.weight_scale").float(), scale.float())
        values = nvfp4.dequantize(codes, scale, divisor)
        assert torch.equal(values.bfloat16().float(), values), "exact in bfloat16"
    absmax = load_statistics(source).get("layers.0.attn_in", "absmax").amax()
    inputs = packed.read(f"{Q0}.input_global_scale")
    assert inputs <= nvfp4.global_scale(absmax) < 2 * inputs


def test_osc_separates_by_the_statistics(calibrated: Path, tmp_path: Path) -> None:
    result = pack(calibrated, PackOptions("osc"), Target(tmp_path / "out"))
    source, packed = open_checkpoint(calibrated), open_checkpoint(result.output)
    hits = load_statistics(source).get("layers.0.attn_in", "hits32").view(-1, 32)
    expected = [g * 32 + int(h.argmax()) for g, h in enumerate(hits) if h.max() > 0]
    index = packed.read(f"{Q0}.outlier_index")
    assert index.tolist() == expected + [-1] * (16 - len(expected))
    weight = source.read(f"{Q0}.weight")
    branch = packed.read(f"{Q0}.outlier_weight")
    assert branch.dtype == torch.bfloat16
    assert torch.equal(branch[:, : len(expected)], weight[:, expected])
    assert not branch[:, len(expected) :].any()
    codes, scale = mxfp4.quantize(weight.index_fill(1, torch.tensor(expected), 0))
    assert torch.equal(packed.read(f"{Q0}.weight_packed"), codes)
    assert torch.equal(packed.read(f"{Q0}.weight_scale"), scale)
    data, scale = mxfp8.quantize(source.read(f"{DOWN1}.weight"))
    assert torch.equal(packed.read(f"{DOWN1}.weight").float(), data.float())
    assert torch.equal(packed.read(f"{DOWN1}.weight_scale"), scale)
    assert packed.config["quantization_config"]["quant_method"] == "quantkit"


def test_a_plan_on_disk_is_what_is_packed(calibrated: Path, tmp_path: Path) -> None:
    planned = separate_outliers(calibrated, Target(tmp_path / "plan"), group=64)
    sites = json.loads((tmp_path / "plan" / PLAN).read_text())
    sites["sites"]["layers.0.attn_in"] = [1, 5, 9, 33]  # edited by hand
    (tmp_path / "plan" / PLAN).write_text(json.dumps(sites))
    result = pack(planned.output, PackOptions("osc"), Target(tmp_path / "out"))
    packed = open_checkpoint(result.output)
    assert packed.read(f"{Q0}.outlier_index").tolist() == [1, 5, 9, 33] + [-1] * 12
    fmt = from_json(packed.config["quantization_config"]).site("layers.0.attn_in", "attn_in")
    assert fmt is not None
    assert (fmt.group, fmt.outliers) == (64, 16)
    assert packed.manifest is not None
    assert packed.manifest.steps[-1].plan_digest


def test_another_group_than_the_plans_is_refused(calibrated: Path, tmp_path: Path) -> None:
    planned = separate_outliers(calibrated, Target(tmp_path / "plan"), group=64)
    with pytest.raises(UsageError, match="made with groups of 64, not 32") as error:
        pack(planned.output, PackOptions("osc", group=32), Target(tmp_path / "out"))
    assert "separate-outliers" in str(error.value.hint)


def test_a_site_without_outliers_has_no_branch(calibrated: Path, tmp_path: Path) -> None:
    planned = separate_outliers(calibrated, Target(tmp_path / "plan"))
    data = json.loads((planned.output / PLAN).read_text())
    data["sites"]["layers.1.mlp_in"] = []
    (planned.output / PLAN).write_text(json.dumps(data))
    result = pack(planned.output, PackOptions("osc"), Target(tmp_path / "out"))
    packed = open_checkpoint(result.output)
    assert "model.layers.1.mlp.up_proj.outlier_weight" not in packed.tensors
    assert "model.layers.0.mlp.up_proj.outlier_weight" in packed.tensors
    fmt = result.scheme.overrides["layers.1.mlp_in"]
    assert fmt is not None
    assert fmt.branch is None


def test_fp8_branch(calibrated: Path, tmp_path: Path) -> None:
    result = pack(calibrated, PackOptions("osc", branch="fp8"), Target(tmp_path / "out"))
    source, packed = open_checkpoint(calibrated), open_checkpoint(result.output)
    index = packed.read(f"{Q0}.outlier_index")
    columns = source.read(f"{Q0}.weight")[:, index[index >= 0].long()].float()
    branch = packed.read(f"{Q0}.outlier_weight").float()[:, : columns.shape[1]]
    values = branch * e8m0.decode(packed.read(f"{Q0}.outlier_weight_scale"))
    assert packed.read(f"{Q0}.outlier_weight").dtype == torch.float8_e4m3fn
    assert (values - columns).abs().max() <= 2**-4 * columns.abs().max()


def test_kinds_left_out_stay_linears(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("mxfp4", sites={"mlp_out": "bf16"})
    result = pack(calibrated, options, Target(tmp_path / "out"))
    source, packed = open_checkpoint(calibrated), open_checkpoint(result.output)
    assert torch.equal(packed.read(f"{DOWN1}.weight"), source.read(f"{DOWN1}.weight"))
    section = packed.config["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    assert r"re:.*\.down_proj$" in section["ignore"]


def test_without_statistics(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    pack(model, PackOptions("mxfp4"), Target(tmp_path / "mxfp4"))
    pack(model, PackOptions("mxfp8"), Target(tmp_path / "mxfp8"))
    for scheme in ("osc", "nvfp4"):
        with pytest.raises(InputRejected, match="no statistics") as error:
            pack(model, PackOptions(scheme), Target(tmp_path / scheme))
        assert "quantkit calibrate" in str(error.value.hint)
        assert not (tmp_path / scheme).exists()
        assert not (tmp_path / f"{scheme}.partial").exists()


def changed(calibrated: Path, folder: Path, value: float, name: str = f"{Q0}.weight") -> Path:
    """A copy of the checkpoint with one weight changed under statistics and plan."""
    shutil.copytree(calibrated, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_stale_statistics_and_plans_are_refused(calibrated: Path, tmp_path: Path) -> None:
    stale = changed(calibrated, tmp_path / "stale", 3.0)
    with pytest.raises(InputRejected, match="other weights") as error:
        pack(stale, PackOptions("osc"), Target(tmp_path / "out"))
    assert "quantkit calibrate" in str(error.value.hint)
    planned = separate_outliers(calibrated, Target(tmp_path / "plan")).output
    stale = changed(planned, tmp_path / "stale-plan", 3.0)
    with pytest.raises(InputRejected, match="plan was made for other weights") as error:
        pack(stale, PackOptions("osc"), Target(tmp_path / "out"))
    assert "quantkit separate-outliers" in str(error.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    calibrated: Path, tmp_path: Path, value: float
) -> None:
    bad = changed(calibrated, tmp_path / "bad", value)
    with pytest.raises(InputRejected, match=f"{Q0}.weight holds NaN or infinity"):
        pack(bad, PackOptions("mxfp4"), Target(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_packing_twice_is_refused(calibrated: Path, tmp_path: Path) -> None:
    pack(calibrated, PackOptions("mxfp4"), Target(tmp_path / "out"))
    with pytest.raises(InputRejected, match="is packed already"):
        pack(tmp_path / "out", PackOptions("mxfp4"), Target(tmp_path / "again"))


def test_widths_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", intermediate_size=80)
    with pytest.raises(InputRejected, match="80 channels do not divide into mxfp4 blocks") as error:
        pack(model, PackOptions("mxfp4"), Target(tmp_path / "out"))
    assert "--site" in str(error.value.hint)
    options = PackOptions("mxfp4", sites={"mlp_out": "bf16"})
    assert pack(model, options, Target(tmp_path / "out")).linears == 12


def test_a_plan_with_impossible_channels_is_refused(calibrated: Path, tmp_path: Path) -> None:
    planned = separate_outliers(calibrated, Target(tmp_path / "plan")).output
    data = json.loads((planned / PLAN).read_text())
    data["sites"]["layers.0.attn_in"] = [64]
    (planned / PLAN).write_text(json.dumps(data))
    with pytest.raises(InputRejected, match=r"layers.0.attn_in has no channel 64"):
        pack(planned, PackOptions("osc"), Target(tmp_path / "out"))


def test_an_interrupted_run_ends_with_the_same_bytes(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.pack import plain as module

    options = PackOptions("osc", mlp_out="mxfp4")
    pack(calibrated, options, Target(tmp_path / "whole"))
    real, count = module.round_weight, 0

    def interrupted(*arguments: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "round_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(calibrated, options, Target(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    pack(calibrated, options, Target(tmp_path / "out"))
    assert count < 9 + 14, "finished groups are not rounded again"
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()


def test_preview_counts_what_pack_writes(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("osc")
    data, text = preview(calibrated, options, Target(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert "mxfp4 + bf16 branch" in text
    result = pack(calibrated, options, Target(tmp_path / "out"))
    assert {row["kind"]: row["bits"] for row in data["kinds"]} == {
        kind: bits for kind, bits in result.bits.items() if kind != "all"
    }
    written = sum(t.nbytes for t in open_checkpoint(result.output).tensors.values())
    assert data["bytes_out"] == written


def test_the_plan_of_another_step_is_complete(calibrated: Path, tmp_path: Path) -> None:
    planned = separate_outliers(calibrated, Target(tmp_path / "plan")).output
    plan = load_plan(open_checkpoint(planned))
    assert plan is not None
    assert len(plan.sites) == 8
    made = pack(planned, PackOptions("osc"), Target(tmp_path / "a"))
    direct = pack(calibrated, PackOptions("osc"), Target(tmp_path / "b"))
    first, second = (r.output / "model.safetensors" for r in (made, direct))
    assert first.read_bytes() == second.read_bytes()
