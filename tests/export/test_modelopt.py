"""The modelopt export beside what NVIDIA Model Optimizer itself writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.export.export import Options, export
from quantkit.export.modelopt import is_exact
from quantkit.formats import nvfp4
from quantkit.kernels.reference import dequantized_weight
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.rtn import global_divisor
from tests.export.test_compressed_tensors import linears
from tests.tiny import VOCAB, tiny_model

pytestmark = [
    pytest.mark.usefixtures("elsewhere"),
    pytest.mark.filterwarnings("ignore:transformers .* is not tested:UserWarning"),
]
qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
TO = Options("modelopt")


@pytest.fixture(scope="module")
def packed(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvfp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return pack(calibrated, PackOptions("nvfp4"), Target(folder / "packed")).output


@pytest.fixture(scope="module")
def exported(packed: Path) -> Checkpoint:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(packed.parent)
        return open_checkpoint(export(packed, TO, Target(packed.parent / "exported")).output)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Model Optimizer's own exporter writes for a model of the same shape."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint

    folder = tmp_path_factory.mktemp("modelopt")
    model = tiny_model().to(torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    ids = torch.randint(3, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    model = quantization.quantize(model, quantization.NVFP4_DEFAULT_CFG, lambda m: m(ids))
    export_hf_checkpoint(model, export_dir=str(folder / "theirs"))
    return folder / "theirs"


def test_tensors_have_the_names_types_and_shapes_of_its_own(
    exported: Checkpoint, theirs: Path
) -> None:
    other = open_checkpoint(theirs)
    assert set(exported.names()) == set(other.names())
    for name, info in other.tensors.items():
        ours = exported.tensors[name]
        assert (ours.dtype, ours.shape) == (info.dtype, info.shape), name


def test_configurations_say_what_its_own_say(exported: Checkpoint, theirs: Path) -> None:
    assert without_version(exported.config["quantization_config"]) == without_version(
        json.loads((theirs / "config.json").read_text())["quantization_config"]
    )
    file = "hf_quant_config.json"
    assert without_version(json.loads((exported.path / file).read_text())) == without_version(
        json.loads((theirs / file).read_text())
    )


def without_version(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"producer": config["producer"]["name"]}


def test_it_dequantizes_to_our_weights_bit_for_bit(packed: Path, exported: Checkpoint) -> None:
    for module, (fmt, tensors) in linears(open_checkpoint(packed)).items():
        weight, scale, double_scale = (
            exported.read(f"{module}.{n}") for n in ("weight", "weight_scale", "weight_scale_2")
        )
        shape = (weight.shape[0], weight.shape[1] * 2)
        for dtype in (torch.float32, torch.bfloat16):
            found = qtensor.NVFP4QTensor(torch.Size(shape), dtype, weight).dequantize(
                scale=scale, double_scale=double_scale, block_sizes={-1: 16}
            )
            expected = dequantized_weight(tensors, fmt, dtype)
            assert torch.equal(found, expected), module
        assert 1 / exported.read(f"{module}.input_scale") == tensors["input_global_scale"]


def test_its_quantizer_makes_our_bytes_under_our_scales() -> None:
    """Its rounding and nibble order are ours: the same bytes come out of both."""
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    divisor = global_divisor([w])
    codes, scale, _ = nvfp4.quantize(w, divisor)
    quantized, theirs, _ = qtensor.NVFP4QTensor.quantize(
        w.clone(), 16, weights_scaling_factor_2=1 / divisor
    )
    assert torch.equal(theirs.view(torch.uint8), scale.view(torch.uint8))
    same = quantized._quantized_data == codes
    assert same.float().mean() > 0.999  # it counts -0 as 0


def test_sites_left_out_are_excluded(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("nvfp4", sites={"mlp_out": "bf16"})
    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    done = open_checkpoint(export(packed, TO, Target(tmp_path / "out")).output)
    ignore = done.config["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.down_proj" in ignore
    assert done.tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16


def test_load_says_that_it_does_not_read_it(exported: Checkpoint) -> None:
    with pytest.raises(InputRejected, match="quant_method 'modelopt' is not one quantkit runs"):
        quantkit.load(exported.path)


def test_what_it_has_no_layout_for(calibrated: Path, tmp_path: Path) -> None:
    packed = pack(calibrated, PackOptions("mxfp4"), Target(tmp_path / "a")).output
    with pytest.raises(UsageError, match="NVFP4 only"):
        export(packed, TO, Target(tmp_path / "out"))
    options = PackOptions("nvfp4", sites={"attn_in": "nvfp4+fp8"})
    packed = pack(calibrated, options, Target(tmp_path / "b")).output
    with pytest.raises(UsageError, match="plain NVFP4") as refused:
        export(packed, TO, Target(tmp_path / "out"))
    assert "--fold-outliers" in (refused.value.hint or "")
    folded = export(packed, Options(fold_outliers=True, windows=0), Target(tmp_path / "folded"))
    assert export(folded.output, TO, Target(tmp_path / "out")).linears == 14


def test_scales_without_an_exact_reciprocal_are_refused(packed: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(packed, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_global_scale"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputRejected, match="reciprocal"):
        export(tmp_path / "other", TO, Target(tmp_path / "out"))
    assert is_exact(torch.tensor([0.125]))
    assert not is_exact(torch.tensor([3.0]))


def test_an_export_repeats_nothing_that_is_done(
    packed: Path, exported: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.export import modelopt

    convert, calls = modelopt.convert, 0

    def interrupted(tensors: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return convert(tensors)

    monkeypatch.setattr(modelopt, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(packed, TO, Target(tmp_path / "out"))
    done = open_checkpoint(export(packed, TO, Target(tmp_path / "out")).output)
    assert calls < 9 + 14, "what the first run wrote was not converted again"
    for name in exported.names():
        a, b = done.read(name), exported.read(name)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name
