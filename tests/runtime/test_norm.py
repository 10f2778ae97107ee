"""Norms inside the activation kernel: the same numbers, and only where nobody else reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit
from quantkit.checkpoint.step import Target
from quantkit.formats import mxfp4
from quantkit.kernels import dispatch, reference
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.scheme import SiteFormat, build
from quantkit.runtime.convert import replace_linears
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.norm import SiteNorm
from tests.tiny import tiny_model

FORMAT = SiteFormat("mxfp4", "mxfp4")
calls: list[str] = []


@torch.library.custom_op("quantkit_test::joined", mutates_args=())
def joined(x: Tensor, weight: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    calls.append("plain" if gain is None else "normed")
    if gain is not None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        x = gain * wide.to(x.dtype)
    return (mxfp4.fake_quantize(x.float(), "even") @ weight.T).to(x.dtype)


@joined.register_fake
def _(x: Tensor, weight: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    return x.new_empty(len(x), len(weight))


class Kernel(nn.Module):
    """Linears of a site at once; `Normalising` takes the norm in."""

    def __init__(self, linears: list[dict[str, Tensor]]) -> None:
        super().__init__()
        weights = [reference.dequantized_weight(linear, FORMAT).float() for linear in linears]
        self.register_buffer("weight", torch.cat(weights), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return joined(x, self.weight, None, 0.0)


class Normalising(Kernel):
    def normed(self, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        return joined(x, self.weight, gain, epsilon)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    dispatch.forget()
    calls.clear()


def packed_model(family: str = "llama", **changes: Any) -> Any:
    model = tiny_model(family, **changes).to(torch.bfloat16)
    weights = dict(model.state_dict())
    replace_linears(model, build("mxfp4"), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            shape = (module.out_features, module.in_features)
            weight = weights.get(f"{name}.weight", torch.randn(shape, generator=generator) / 8)
            module.weight_packed, module.weight_scale = mxfp4.quantize(weight.float(), "even")
            if module.bias is not None:
                zeros = torch.zeros(shape[0], dtype=torch.bfloat16)
                module.bias = nn.Parameter(zeros, requires_grad=False)
    return model


def run_on(kernel: type[Kernel] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = lambda site, work, linears, device: kernel and kernel(linears)  # noqa: E731
    monkeypatch.setattr(dispatch, "prepare", prepare)


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def norms(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SiteNorm)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_both_norms_of_a_block_move_into_the_kernel(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(family)
    layers = ("input_layernorm", "post_attention_layernorm")
    assert norms(model) == [f"model.layers.{i}.{n}" for i in range(2) for n in layers]
    run_on(Kernel, monkeypatch)
    want = logits(model)
    assert set(calls) == {"plain"}
    calls.clear()
    run_on(Normalising, monkeypatch)
    model.to("cpu")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.site.forget()
    assert torch.equal(logits(model), want)
    assert calls == ["normed", "plain"] * 4, "q, k, v; o; gate, up; down"
    for module in model.modules():
        if isinstance(module, QuantLinear):
            assert module.site._handed is None
            assert module.site._result is None


def test_a_router_keeps_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("qwen3_moe")
    assert norms(model) == [f"model.layers.{i}.input_layernorm" for i in range(2)]
    run_on(Kernel, monkeypatch)
    want = logits(model)
    run_on(Normalising, monkeypatch)
    assert torch.equal(logits(packed_model("qwen3_moe")), want)
    assert "normed" in calls


@pytest.mark.parametrize("family", ["gemma", "gemma2", "granite", "smollm3", "phi3"])
def test_other_families_keep_their_norms(family: str) -> None:
    assert norms(packed_model(family)) == []


def test_an_unpacked_linear_keeps_its_norm() -> None:
    model = tiny_model("llama")
    scheme = build("mxfp4")
    replace_linears(model, replace(scheme, sites={**scheme.sites, "attn_in": None}), torch.bfloat16)
    assert norms(model) == [f"model.layers.{i}.post_attention_layernorm" for i in range(2)]


def test_a_subclass_of_a_known_part_keeps_its_norm() -> None:
    from transformers.models.llama import modeling_llama

    class Other(modeling_llama.LlamaAttention):
        pass

    model = tiny_model("llama")
    model.model.layers[0].self_attn.__class__ = Other
    replace_linears(model, build("mxfp4"), torch.bfloat16)
    assert len(norms(model)) == 3


def test_the_reference_computes_the_norm_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    got = logits(model)
    plain = packed_model()
    for layer in plain.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            fused = getattr(layer, name)
            norm = type(plain.model.norm)(64, fused.variance_epsilon)
            norm.weight = fused.weight
            setattr(layer, name, norm)
    assert torch.equal(got, logits(plain))


def test_whoever_looks_between_sees_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Normalising, monkeypatch)
    model = packed_model()
    want = logits(model)
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.self_attn.k_proj, layer.self_attn):
        seen: list[Tensor] = []
        calls.clear()
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append([*args, *kwargs.values()][0]),
            with_kwargs=True,
        )
        if module is layer.input_layernorm:  # its own input is what it always was
            handle.remove()
            handle = module.register_forward_hook(lambda _, args, y, seen=seen: seen.append(y))
        assert torch.equal(logits(model), want)
        handle.remove()
        assert calls.count("normed") == 3
        x = seen[0].float()
        gain = layer.input_layernorm.weight.float()
        assert (x / gain).pow(2).mean(-1).sub(1).abs().max() < 0.05
    calls.clear()
    logits(model)
    assert calls.count("normed") == 4


def test_hidden_states_are_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Kernel, monkeypatch)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = packed_model()(ids, output_hidden_states=True).hidden_states
        run_on(Normalising, monkeypatch)
        got = packed_model()(ids, output_hidden_states=True).hidden_states
    assert "normed" in calls
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_pass_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Normalising, monkeypatch)
    layer = packed_model().model.layers[0]
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer.input_layernorm(x)
    y.float().pow(2).sum().backward()
    assert x.grad is not None
    assert layer.input_layernorm.weight.grad is not None


def test_another_type_of_the_gain_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Normalising, monkeypatch)
    norm = packed_model().model.layers[0].input_layernorm
    norm.weight.data = norm.weight.data.float()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert norm(x).dtype == torch.float32


def test_what_is_handed_on_is_told_from_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Normalising, monkeypatch)
    layer = packed_model().model.layers[0]
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        handed = layer.input_layernorm(x)
        other = layer.self_attn.q_proj(x)  # the very tensor that went into the norm
        assert calls == ["plain"]
        assert not torch.equal(layer.self_attn.q_proj(handed), other)
        assert calls == ["plain", "normed"]


def test_torch_compile_traces_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Normalising, monkeypatch)
    model = packed_model()
    want = logits(model)
    calls.clear()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(logits(model), want)
    assert calls == ["normed", "plain"] * 4
    torch._dynamo.reset()


@pytest.mark.usefixtures("elsewhere")
def test_a_saved_model_has_the_bytes_it_was_loaded_from(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(Normalising, monkeypatch)
    packed = pack(calibrated, PackOptions("mxfp4"), Target(tmp_path / "packed")).output
    model = quantkit.load(packed)
    assert len(norms(model)) == 4
    logits(model)
    assert "normed" in calls
    model.save_pretrained(tmp_path / "saved")
    before, after = (next(p.glob("*.safetensors")) for p in (packed, tmp_path / "saved"))
    first, second = load_file(before), load_file(after)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
