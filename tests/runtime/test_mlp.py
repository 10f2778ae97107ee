"""The packed MLP: its children keep their names, SwiGLU runs where a kernel takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from quantkit.formats import mxfp4
from quantkit.kernels import dispatch, reference
from quantkit.pack.scheme import SiteFormat, build
from quantkit.runtime.convert import replace_linears
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.mlp import PackedMlp, fuse
from quantkit.runtime.site import PackedSite
from tests.tiny import tiny_model

FORMAT = SiteFormat("mxfp4", "mxfp4")
HIDDEN, INNER = 64, 96


class Joined(nn.Module):
    """A kernel in plain torch, with or without SwiGLU."""

    def __init__(self, linears: list[dict[str, Tensor]]) -> None:
        super().__init__()
        weights = [reference.dequantized_weight(linear, FORMAT) for linear in linears]
        self.register_buffer("weight", torch.cat(weights), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return mxfp4.fake_quantize(x, "even") @ self.weight.T


class Gated(Joined):
    calls = 0

    def gated(self, gate_up: Tensor) -> Tensor:
        Gated.calls += 1
        gate, up = gate_up.chunk(2, dim=-1)
        return self(silu(gate) * up)


class Mlp(nn.Module):
    """What transformers builds for a llama block."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        inner, outer = (PackedSite(f"layers.0.mlp_{k}", FORMAT, "even") for k in ("in", "out"))
        self.gate_proj = QuantLinear(HIDDEN, INNER, FORMAT, site=inner)
        self.up_proj = QuantLinear(HIDDEN, INNER, FORMAT, site=inner)
        self.down_proj = QuantLinear(INNER, HIDDEN, FORMAT, site=outer)
        self.act_fn = activation
        generator = torch.Generator().manual_seed(0)
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            weight = torch.randn(linear.out_features, linear.in_features, generator=generator)
            linear.weight_packed, linear.weight_scale = mxfp4.quantize(weight, "even")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def block(activation: nn.Module) -> Any:
    module = nn.Module()
    module.mlp = Mlp(activation)
    return module


@pytest.fixture(autouse=True)
def _quiet() -> None:
    dispatch.forget()
    Gated.calls = 0


@pytest.mark.parametrize("kernel", [None, Joined, Gated])
@pytest.mark.parametrize("activation", [nn.SiLU(), ACT2FN["silu"]], ids=["torch", "transformers"])
def test_it_computes_what_the_mlp_did(
    activation: nn.Module, kernel: type[Joined] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = lambda site, work, linears, device: kernel and kernel(linears)  # noqa: E731
    monkeypatch.setattr(dispatch, "prepare", prepare)
    x = torch.randn(2, 3, HIDDEN)
    plain = block(activation).mlp
    fused = block(activation)
    fuse(fused)
    assert isinstance(fused.mlp, PackedMlp)
    torch.testing.assert_close(fused.mlp(x), plain(x))
    assert Gated.calls == (1 if kernel is Gated else 0)
    assert fused.mlp.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_models_of_transformers_have_it(family: str) -> None:
    model = tiny_model(family)
    replace_linears(model, build("mxfp4"), torch.float32)
    assert all(isinstance(layer.mlp, PackedMlp) for layer in model.model.layers)


def test_torch_compile_traces_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "prepare", lambda *arguments: Gated(arguments[2]))
    fused = block(nn.SiLU())
    fuse(fused)
    x = torch.randn(4, HIDDEN)
    want = fused.mlp(x)
    torch._dynamo.reset()
    compiled = torch.compile(fused.mlp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch._dynamo.reset()


def test_another_activation_or_an_unpacked_linear_stays_as_it_is() -> None:
    gelu = block(nn.GELU())
    fuse(gelu)
    assert isinstance(gelu.mlp, Mlp)
    partly = block(nn.SiLU())
    partly.mlp.down_proj = nn.Linear(INNER, HIDDEN)
    fuse(partly)
    assert isinstance(partly.mlp, Mlp)
