"""Packed checkpoints as transformers models: logits, generation, saving, moving, mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected
from quantkit.kernels import reference
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.runtime.experts import QuantExperts
from quantkit.runtime.linear import QuantLinear
from tests.tiny import VOCAB, calibrate_tiny, save_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
OSC4 = PackOptions("osc", mlp_out="mxfp4")
RESIDUAL = PackOptions("nvfp4", branch="residual", branch_bits=1.2)


def tokens(count: int = 24) -> Tensor:
    return torch.randint(3, VOCAB, (2, count), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens() if ids is None else ids).logits


def original(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def rounded_by_hooks(folder: Path, packed: Path, dtype: torch.dtype) -> Any:
    """The original model with each linear replaced by the plain reference on the file's tensors."""
    model, checkpoint = original(folder, dtype), open_checkpoint(packed)
    scheme = quantkit.runtime.load.scheme_of(checkpoint)  # type: ignore[attr-defined]
    assert scheme is not None
    kinds = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "attn_out", "down": "mlp_out"}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        kind = kinds.get(name.rsplit(".", 1)[1].removesuffix("_proj"), "mlp_in")
        fmt = scheme.site(f"layers.{name.split('.')[2]}.{kind}", kind)
        tensors = {
            key.removeprefix(f"{name}."): checkpoint.read(key)
            for key in checkpoint.names()
            if key.startswith(f"{name}.")
        }
        bias = tensors.pop("bias", None)

        def forward(x: Tensor, tensors=tensors, fmt=fmt, bias=bias) -> Tensor:  # type: ignore
            return reference.packed_linear(x, tensors, fmt, scheme.scale_rule, bias)

        module.forward = forward
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [PackOptions("mxfp4"), PackOptions("nvfp4"), PackOptions("osc"), OSC4, RESIDUAL],
    ids=["mxfp4", "nvfp4", "osc", "osc4", "residual"],
)
def test_logits_are_those_of_the_files_arithmetic(
    calibrated: Path, tmp_path: Path, options: PackOptions, dtype: torch.dtype
) -> None:
    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    model = quantkit.load(packed, dtype=dtype)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    found = logits(model)
    assert torch.equal(found, logits(rounded_by_hooks(calibrated, packed, dtype)))
    error = (found - logits(original(calibrated, dtype))).norm() / found.norm()
    assert 0.01 < error < 0.6, "quantized, and still the same model"


def test_scale_rules_reach_the_activations(calibrated: Path, tmp_path: Path) -> None:
    results = []
    for rule in ("floor", "even", "rceil"):
        options = PackOptions("mxfp4", scale_rule=rule)
        model = quantkit.load(pack(calibrated, options, Target(tmp_path / rule)).output)
        sites = {m.site.rule for m in model.modules() if isinstance(m, QuantLinear)}
        assert sites == {rule}
        results.append(logits(model))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize("branch", ["bf16", "residual"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "qwen3_moe", "mixtral"])
def test_nothing_changes_when_nothing_is_rounded(tmp_path: Path, family: str, branch: str) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    source = calibrate_tiny(tmp_path, family, dtype=torch.float32, **changes)
    options = PackOptions("osc", mlp_out="mxfp4", dtype="float32", branch=branch)
    packed = pack(source, options, Target(tmp_path / "packed")).output
    model = quantkit.load(packed)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(original(source, torch.float32)))


@pytest.mark.parametrize("options", [PackOptions("osc"), RESIDUAL], ids=["osc", "residual"])
def test_from_pretrained_generate_and_save(
    calibrated: Path, tmp_path: Path, options: PackOptions
) -> None:
    from transformers import AutoModelForCausalLM

    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    ours = quantkit.load(packed)
    theirs = AutoModelForCausalLM.from_pretrained(packed).eval()
    assert theirs.config.quantization_config.quant_method == "quantkit"
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(logits(ours), logits(theirs))
    made = theirs.generate(tokens(8), max_new_tokens=12, do_sample=False)
    assert torch.equal(made, ours.generate(tokens(8), max_new_tokens=12, do_sample=False))
    assert made.shape[1] > 8

    theirs.save_pretrained(tmp_path / "saved")
    before, after = open_checkpoint(packed), open_checkpoint(tmp_path / "saved")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        a, b = before.read(name), after.read(name)
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert after.config["quantization_config"] == before.config["quantization_config"]
    assert torch.equal(logits(quantkit.load(tmp_path / "saved")), logits(ours))


def test_a_device_map_gives_the_same_model(calibrated: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    packed = pack(calibrated, PackOptions("osc"), Target(tmp_path / "packed")).output
    spread = AutoModelForCausalLM.from_pretrained(packed, device_map="auto").eval()
    assert torch.equal(logits(quantkit.load(packed)), logits(spread))


def test_casting_a_model_keeps_its_packed_numbers(calibrated: Path, tmp_path: Path) -> None:
    packed = pack(calibrated, PackOptions("osc"), Target(tmp_path / "packed")).output
    cast = nn.Module.float(quantkit.load(packed))  # the model itself refuses
    assert cast.lm_head.weight.dtype == torch.float32
    assert cast.model.layers[0].self_attn.q_proj.outlier_weight.dtype == torch.bfloat16
    assert cast.model.layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(logits(cast), logits(quantkit.load(packed, dtype=torch.float32)))


def test_new_weights_are_decoded_again(calibrated: Path, tmp_path: Path) -> None:
    first = pack(calibrated, PackOptions("mxfp4"), Target(tmp_path / "a")).output
    other = pack(
        calibrated, PackOptions("mxfp4", scale_rule="rceil"), Target(tmp_path / "b")
    ).output
    model, wanted = quantkit.load(first), quantkit.load(other)
    before = model.model.layers[0].self_attn.q_proj(torch.ones(1, 64))
    model.load_state_dict(wanted.state_dict())
    after = model.model.layers[0].self_attn.q_proj(torch.ones(1, 64))
    assert torch.equal(after, wanted.model.layers[0].self_attn.q_proj(torch.ones(1, 64)))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "osc"])
def test_mixtures(tmp_path: Path, scheme: str, fused: bool) -> None:
    source = calibrate_tiny(tmp_path, "qwen3_moe")
    if fused:
        source = fuse_experts(source, tmp_path / "fused")
    packed = pack(source, PackOptions(scheme), Target(tmp_path / "packed")).output
    names = open_checkpoint(packed).names()
    weight = "weight" if scheme == "mxfp8" else "weight_packed"
    assert f"model.layers.1.mlp.experts.3.gate_proj.{weight}" in names
    assert not any("experts.gate_up_proj" in name for name in names)
    model = quantkit.load(packed)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    error = (logits(model) - logits(original(source, torch.bfloat16))).norm() / logits(model).norm()
    assert 0.005 < error < 0.6
    if scheme == "osc":  # the others are compressed-tensors' own to load
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(packed, device_map="auto").eval()
        assert torch.equal(logits(theirs), logits(model))
    model.save_pretrained(tmp_path / "saved")
    before, after = open_checkpoint(packed), open_checkpoint(tmp_path / "saved")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        assert torch.equal(*(c.read(name).view(torch.uint8) for c in (before, after))), name
    assert torch.equal(logits(quantkit.load(tmp_path / "saved")), logits(model))


def fuse_experts(source: Path, target: Path) -> Path:
    """The same checkpoint with the experts of each layer in two tensors [experts, out, in]."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        parts = [
            [tensors.pop(f"{at}{e}.{name}_proj.weight") for name in ("gate", "up", "down")]
            for e in range(4)
        ]
        tensors[f"{at}gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in parts])
        tensors[f"{at}down_proj"] = torch.stack([d for _, _, d in parts])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    from quantkit.calibrate.layerwise import Options, calibrate

    data = f"{source.parent / 'tokens.safetensors'}:ids"
    for name in ("quantkit.json", "statistics.safetensors"):
        (target / name).unlink()
    output = target.with_name("fused-calibrated")
    calibrate(target, Options(data, samples=8, device="cpu"), Target(output))
    return output


def test_experts_of_a_kind_left_out_stay_linears(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    options = PackOptions("mxfp4", sites={"mlp_out": "bf16"})
    model = quantkit.load(pack(source, options, Target(tmp_path / "packed")).output)
    expert = model.model.layers[0].mlp.experts.get_submodule("2")
    assert isinstance(expert["gate_proj"], QuantLinear)
    assert type(expert["down_proj"]) is nn.Linear
    weight = open_checkpoint(source).read("model.layers.0.mlp.experts.2.down_proj.weight")
    assert torch.equal(expert["down_proj"].weight, weight)


@pytest.mark.parametrize("damage", [100_000, 64, -2, 0], ids=lambda d: f"index-{d}")
@pytest.mark.parametrize("options", [PackOptions("osc"), RESIDUAL], ids=["osc", "residual"])
def test_an_index_of_no_channels_is_one_line(
    calibrated: Path, tmp_path: Path, options: PackOptions, damage: int
) -> None:
    from safetensors.torch import load_file, save_file

    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    tensors = load_file(packed / "model.safetensors")
    index = tensors["model.layers.1.mlp.up_proj.outlier_index"]
    index[1] = damage
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    model = quantkit.load(packed)
    with pytest.raises(InputRejected, match=r"layers\.1\.mlp_in: outlier_index does not name"):
        logits(model)


def test_an_ordinary_checkpoint_loads_too(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    assert torch.equal(logits(quantkit.load(source)), logits(original(source, torch.float32)))


def test_other_quantization_methods_are_refused(tmp_path: Path) -> None:
    import json

    source = save_tiny(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRejected, match="'bitsandbytes' is not one quantkit runs"):
        quantkit.load(source)
