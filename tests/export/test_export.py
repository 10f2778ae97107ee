"""`quantkit export`: what is written, what it costs, and that a killed or repeated run agrees."""

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
from quantkit.export import export as step
from quantkit.export.export import Options, export
from quantkit.kernels.reference import dequantized_weight
from quantkit.pack.job import PackOptions
from quantkit.pack.modules import unpacked_weight
from quantkit.pack.pack import pack
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.load import scheme_of
from tests.export.test_compressed_tensors import assert_the_library_agrees, linears
from tests.tiny import VOCAB, calibrate_tiny, save_tiny
from tests.workspace import Shell, Workspace

pytestmark = pytest.mark.usefixtures("elsewhere")
OSC4 = PackOptions("osc", mlp_out="mxfp4")
NVFP4_BRANCH = PackOptions("nvfp4", sites=dict.fromkeys(("attn_in", "mlp_out"), "nvfp4+fp8"))
UNMEASURED = Options(fold_outliers=True, windows=0)
IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(path: Path) -> Tensor:
    return quantkit.load(path)(IDS).logits


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    return set(a.names()) == set(b.names()) and all(
        torch.equal(a.read(name).view(torch.uint8), b.read(name).view(torch.uint8))
        for name in a.names()
    )


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "mxfp8"])
def test_a_plain_checkpoint_is_linked_as_it_is(
    calibrated: Path, tmp_path: Path, scheme: str
) -> None:
    packed = pack(calibrated, PackOptions(scheme), Target(tmp_path / "packed")).output
    done = export(packed, Options(), Target(tmp_path / "out"))
    before, after = open_checkpoint(packed), open_checkpoint(done.output)
    assert after.config["quantization_config"] == before.config["quantization_config"]
    assert same_tensors(before, after)
    assert all(path.stat().st_nlink > 1 for path in after.shards.values())
    assert done.as_json()["lossless"]
    assert after.manifest is not None
    assert [s.verb for s in after.manifest.steps] == ["calibrate", "pack", "export"]


def test_a_packed_head_goes_along_and_modelopt_has_none(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("osc", head="mxfp8", embedding="mxfp8")
    osc = pack(calibrated, options, Target(tmp_path / "osc")).output
    folded = Options(fold_outliers=True, windows=0)
    exported = open_checkpoint(export(osc, folded, Target(tmp_path / "ct")).output)
    assert_the_library_agrees(exported)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.weight_scale"):
        a, b = (c.read(name).view(torch.uint8) for c in (exported, open_checkpoint(osc)))
        assert torch.equal(a, b)
    four = pack(calibrated, PackOptions("mxfp4", embedding="mxfp4"), Target(tmp_path / "four"))
    assert four.quant_method == "quantkit"
    with pytest.raises(UsageError, match="embed_tokens is packed as mxfp4, which transformers"):
        export(four.output, Options(), Target(tmp_path / "out"))
    options = PackOptions("nvfp4", head="mxfp8")
    packed = pack(calibrated, options, Target(tmp_path / "nvfp4")).output
    with pytest.raises(UsageError, match="lm_head is packed as mxfp8: modelopt is written for"):
        export(packed, Options("modelopt"), Target(tmp_path / "modelopt"))


def test_one_matrix_as_embedding_and_head_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    options = PackOptions("mxfp4", head="mxfp8", embedding="mxfp8")
    packed = pack(source, options, Target(tmp_path / "packed")).output
    with pytest.raises(UsageError, match="one packed matrix is the embedding and the head"):
        export(packed, Options(), Target(tmp_path / "out"))


def test_a_branch_is_refused_until_it_may_be_folded(calibrated: Path, tmp_path: Path) -> None:
    packed = pack(calibrated, OSC4, Target(tmp_path / "packed")).output
    with pytest.raises(UsageError, match="branch") as refused:
        export(packed, Options(), Target(tmp_path / "out"))
    assert "--fold-outliers" in (refused.value.hint or "")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(InputRejected, match="not packed"):
        export(calibrated, Options(), Target(tmp_path / "out"))
    with pytest.raises(UsageError, match="--to gguf"):
        export(packed, Options("gguf"), Target(tmp_path / "out"))


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt"])
def test_a_residual_branch_is_refused(calibrated: Path, tmp_path: Path, to: str) -> None:
    options = PackOptions("nvfp4", branch="residual", branch_bits=0.25)
    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    with pytest.raises(UsageError, match=f"residual branch, which {to} cannot express"):
        export(packed, Options(to, fold_outliers=True, windows=0), Target(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_an_index_longer_than_its_weight_is_refused(calibrated: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    options = PackOptions("nvfp4", branch="residual", branch_bits=0.25)
    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.outlier_index"
    tensors[name] = torch.zeros(4096, dtype=torch.int32)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "quantkit.json").unlink()
    with pytest.raises(InputRejected, match=r"up_proj\.outlier_index repeats more columns"):
        export(packed, Options(), Target(tmp_path / "out"))


@pytest.mark.parametrize("options", [PackOptions("osc"), OSC4, NVFP4_BRANCH])
def test_folding_gives_the_library_plain_weights(
    calibrated: Path, tmp_path: Path, options: PackOptions
) -> None:
    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    done = export(packed, UNMEASURED, Target(tmp_path / "out"))
    after = open_checkpoint(done.output)
    assert after.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not any("outlier" in name for name in after.names())
    assert_the_library_agrees(after)
    error = (logits(done.output) - logits(packed)).norm() / logits(packed).norm()
    assert 0.001 < error < 0.6, "lossy, and still the same model"
    scheme, before = scheme_of(open_checkpoint(packed)), open_checkpoint(packed)
    assert scheme is not None
    for module, (fmt, tensors) in linears(after).items():
        kind = next(k for k, names in LEAVES.items() if module.rsplit(".", 1)[1] in names)
        old_fmt = scheme.sites[kind]
        assert old_fmt is not None
        old = read(before, module, old_fmt)
        whole = unpacked_weight(old, old_fmt)
        new = dequantized_weight(tensors, fmt)
        if old_fmt.branch is None:
            assert torch.equal(whole, new), "was plain before: not touched"
            continue
        block = 16 if fmt.weights == "nvfp4" else 32
        outliers = old["outlier_index"][old["outlier_index"] >= 0].long()
        touched = torch.zeros(whole.shape[1] // block, dtype=torch.bool)
        touched[outliers // block] = True
        keep = ~touched.repeat_interleave(block)
        assert torch.equal(new[:, keep], whole[:, keep]), "blocks without outliers keep their bytes"
        relative = (new - whole).norm() / whole.norm()
        assert 0 < relative < 0.2
        assert abs(done.weight_error[kind] - relative) < 0.1


LEAVES = {
    "attn_in": ("q_proj", "k_proj", "v_proj"),
    "attn_out": ("o_proj",),
    "mlp_in": ("gate_proj", "up_proj"),
    "mlp_out": ("down_proj",),
}


def read(checkpoint: Checkpoint, module: str, fmt: SiteFormat) -> dict[str, Tensor]:
    prefix = f"{module}."
    names = [name for name in checkpoint.names() if name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint.read(name) for name in names}


def test_inputs_of_folded_nvfp4_sites_keep_their_range(calibrated: Path, tmp_path: Path) -> None:
    packed = pack(calibrated, NVFP4_BRANCH, Target(tmp_path / "packed")).output
    done = export(packed, UNMEASURED, Target(tmp_path / "out")).output
    name = "model.layers.0.self_attn.q_proj.input_global_scale"
    before, after = open_checkpoint(packed).read(name), open_checkpoint(done).read(name)
    assert after <= before, "the separated channels are larger than the rest"
    met: list[float] = []
    model = quantkit.load(packed)
    module = model.model.layers[0].self_attn.q_proj
    module.register_forward_pre_hook(lambda _, x: met.append(float(x[0].abs().max())))
    from quantkit.data.tokens import load_tokens

    tokens = load_tokens("sample", packed, samples=1, seq_len=512, held_out=True)
    with torch.no_grad():
        model(tokens.ids)
    assert met[0] * float(after) <= 6 * 448 < 2 * met[0] * float(after)


def test_the_price_of_folding_is_measured_on_text(calibrated: Path, tmp_path: Path) -> None:
    packed = pack(calibrated, OSC4, Target(tmp_path / "packed")).output
    options = Options(fold_outliers=True, windows=2, seq_len=64)
    done = export(packed, options, Target(tmp_path / "out"))
    from quantkit.data.tokens import load_tokens
    from quantkit.evaluate.perplexity import compare, negative_log_likelihood

    ids = load_tokens("sample", packed, samples=2, seq_len=64, held_out=True).ids
    losses = [negative_log_likelihood(quantkit.load(p), ids) for p in (packed, done.output)]
    assert done.excess_nll == compare(*losses).mean
    assert done.tokens == 128
    assert "nats per token over its input, on 128 tokens" in done.as_text()
    assert set(done.weight_error) == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    again = export(done.output, Options(), Target(tmp_path / "again"))
    assert same_tensors(open_checkpoint(done.output), open_checkpoint(again.output))


@pytest.mark.parametrize("size", [16, 64])
def test_online_hadamards_travel_as_transform_config(
    calibrated: Path, tmp_path: Path, size: int
) -> None:
    packed = pack(calibrated, PackOptions("mxfp4", hadamard=size), Target(tmp_path / "p")).output
    assert open_checkpoint(packed).config["quantization_config"]["quant_method"] == "quantkit"
    done = export(packed, Options(), Target(tmp_path / "out"))
    after = open_checkpoint(done.output)
    assert same_tensors(open_checkpoint(packed), after)
    assert any("transform_config" in note for note in done.notes)
    assert torch.equal(logits(done.output), logits(packed)), "our own reader runs it"
    assert_the_library_agrees(after)

    from compressed_tensors.transform import TransformConfig, TransformFactory

    config = TransformConfig(**after.config["quantization_config"]["transform_config"])
    model = unrounded(calibrated, after)
    for name, scheme in config.config_groups.items():
        TransformFactory.from_scheme(scheme, name=name).apply_to_model(model)
    # The library's model: its transforms, its decompressed weights, inputs left unrounded. In
    # float32 that is ours with activations left unrounded too.
    from quantkit.transforms.hadamard import rotate_back

    plain = unrounded(calibrated, after, lambda w: rotate_back(w, size))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


def unrounded(source: Path, packed: Checkpoint, change: Any = None) -> Any:
    """The source's model in float32 with the weights of `packed` as its file says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for module, (fmt, tensors) in linears(packed).items():
        weight = dequantized_weight(tensors, fmt)
        model.get_submodule(module).weight.data = change(weight) if change else weight
    return model


def test_a_branch_and_a_hadamard_leave_the_hadamard(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("osc", mlp_out="mxfp4", hadamard=32)
    packed = pack(calibrated, options, Target(tmp_path / "packed")).output
    done = export(packed, UNMEASURED, Target(tmp_path / "out"))
    scheme = scheme_of(open_checkpoint(done.output))
    assert scheme is not None
    assert all(f and f.hadamard == {"block": 32} and not f.branch for f in scheme.sites.values())
    error = (logits(done.output) - logits(packed)).norm() / logits(packed).norm()
    assert 0.001 < error < 0.6


def test_a_hadamard_without_words_is_undone(tmp_path: Path) -> None:
    source = calibrate_tiny(tmp_path, intermediate_size=96)
    others = dict.fromkeys(("attn_in", "attn_out", "mlp_in"), "bf16")
    options = PackOptions("mxfp4", sites=others, hadamard=96)
    packed = pack(source, options, Target(tmp_path / "packed")).output
    with pytest.raises(UsageError, match="a Hadamard of 96"):
        export(packed, Options(), Target(tmp_path / "out"))
    done = export(packed, UNMEASURED, Target(tmp_path / "out"))
    after = open_checkpoint(done.output)
    assert after.config["quantization_config"]["transform_config"] == {}
    assert_the_library_agrees(after)
    assert 0 < (logits(done.output) - logits(packed)).norm() / logits(packed).norm() < 0.4


@pytest.mark.parametrize(
    "transform",
    [
        "quarot",
        {"config_groups": []},
        {"config_groups": {"a": {"type": "random-matrix", "apply": [], "head_dim": 32}}},
        {"config_groups": {"a": {"type": "hadamard", "apply": [], "head_dim": None}}},
        {"config_groups": {"a": {"type": "hadamard", "apply": [{"location": "k_cache"}]}}},
        {
            "config_groups": {
                "a": {
                    "type": "hadamard",
                    "head_dim": 32,
                    "apply": [{"location": "output", "targets": ["Linear"]}],
                }
            }
        },
        {
            "config_groups": {
                "a": {
                    "type": "hadamard",
                    "head_dim": 32,
                    "apply": [{"location": "input", "targets": ["re:.*q_proj$"]}],
                }
            }
        },
    ],
)
def test_transforms_that_would_be_left_out_are_rejected(
    calibrated: Path, tmp_path: Path, transform: Any
) -> None:
    packed = pack(calibrated, PackOptions("mxfp4"), Target(tmp_path / "packed")).output
    opened = open_checkpoint(packed)
    opened.config["quantization_config"]["transform_config"] = transform
    with pytest.raises(InputRejected):
        scheme_of(opened)


def test_a_mixture_is_folded_expert_by_expert(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    source = calibrate_tiny(tmp_path, "mixtral", **changes)
    sites = dict.fromkeys(("mlp_in", "mlp_out"), "nvfp4+bf16")
    packed = pack(source, PackOptions("osc", sites=sites), Target(tmp_path / "packed")).output
    done = export(packed, UNMEASURED, Target(tmp_path / "out"))
    assert "experts" in done.notes[0]
    section = open_checkpoint(done.output).config["quantization_config"]
    assert {group["format"] for group in section["config_groups"].values()} == {
        "mxfp4-pack-quantized",
        "nvfp4-pack-quantized",
    }
    assert len(linears(open_checkpoint(done.output))) == 2 * (4 + 4 * 3)
    error = (logits(done.output) - logits(packed)).norm() / logits(packed).norm()
    assert 0.001 < error < 0.6


def test_an_interrupted_export_ends_with_the_same_bytes(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(calibrated, OSC4, Target(tmp_path / "packed")).output
    whole = export(packed, UNMEASURED, Target(tmp_path / "whole"))
    fold, calls = step.fold_group, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fold(*arguments)

    monkeypatch.setattr(step, "fold_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(packed, UNMEASURED, Target(tmp_path / "out"))
    assert (tmp_path / "out.partial").exists()
    again = export(packed, UNMEASURED, Target(tmp_path / "out"))
    assert again.weight_error == whole.weight_error
    assert same_tensors(open_checkpoint(whole.output), open_checkpoint(again.output))


def test_the_verb(workspace: Workspace, shell: Shell) -> None:
    done = shell("export", "model-osc", "--fold-outliers", "--windows", "1", "--seq-len", "32")
    assert done.code == 0, done.err
    assert "nats per token over its input" in done.out
    assert "wrote model-osc-compressed-tensors" in done.out
    again = shell("export", "model-osc", "--fold-outliers", "--windows", "0")
    assert again.code == 2
    assert "exists" in again.err
    done = shell("export", "model-osc", "--to", "modelopt")
    assert done.code == 2
    assert "quantkit pack --scheme nvfp4" in done.err
    done = shell("export", "model-osc", "--fold-outliers", "--json", "--dry-run", "-o", "elsewhere")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["folded"] == 6
    assert plan["linears"] == 14
    assert plan["bytes_out"] < plan["bytes_in"]
    assert not (workspace.path / "elsewhere").exists()
    written = open_checkpoint("model-osc-compressed-tensors").tensors.values()
    assert sum(info.nbytes for info in written) == plan["bytes_out"]
