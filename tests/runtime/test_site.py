"""A site's kernel: one call for its linears, traced by torch.compile, storage off the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantkit.formats import mxfp4
from quantkit.kernels import dispatch, reference
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.site import PackedSite

FORMAT = SiteFormat("mxfp4", "mxfp4")
OUTPUTS = (32, 16, 16)


@torch.library.custom_op("quantkit_test::counted", mutates_args=())
def counted(x: Tensor, weight: Tensor) -> Tensor:
    calls.append(tuple(x.shape))
    return x @ weight.T


@counted.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


calls: list[tuple[int, ...]] = []


class Joined(nn.Module):
    """A kernel in plain torch: all linears of the site at once."""

    def __init__(self, linears: list[dict[str, Tensor]]) -> None:
        super().__init__()
        weights = [reference.dequantized_weight(linear, FORMAT) for linear in linears]
        self.register_buffer("weight", torch.cat(weights), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return counted(mxfp4.fake_quantize(x, "even"), self.weight)


class Attention(nn.Module):
    """Three packed linears of one site."""

    def __init__(self) -> None:
        super().__init__()
        site = PackedSite("layers.0.attn_in", FORMAT, "even")
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (QuantLinear(64, out, FORMAT, site=site) for out in OUTPUTS)
        for linear in (self.q, self.k, self.v):
            weight = torch.randn(linear.out_features, 64, generator=generator)
            linear.weight_packed, linear.weight_scale = mxfp4.quantize(weight, "even")

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Attention:
    calls.clear()
    monkeypatch.setattr(dispatch, "prepare", lambda site, work, linears, device: Joined(linears))
    return Attention()


def expected(attention: Attention, x: Tensor) -> Tensor:
    parts = [
        reference.packed_linear(x * 2, linear.packed(), FORMAT, "even")
        for linear in (attention.q, attention.k, attention.v)
    ]
    return torch.cat(parts, -1)


def test_one_kernel_call_serves_the_site(attention: Attention) -> None:
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(attention(x), expected(attention, x))
    assert calls == [(10, 64)]
    assert attention.q.site._result is None, "nothing is held once every member has taken it"
    attention(x)
    assert len(calls) == 2, "a later call with the same input computes again"


def test_inference_mode_shares_as_well(attention: Attention) -> None:
    with torch.inference_mode():
        attention(torch.randn(3, 64))
    assert calls == [(3, 64)]


def test_a_member_called_again_is_computed_again(attention: Attention) -> None:
    x = torch.randn(3, 64)
    first = attention.q(x)
    other = attention.q(torch.randn(3, 64))
    assert not torch.equal(first, other)
    assert torch.equal(attention.q(x), first)


def test_torch_compile_traces_it_whole_with_one_call(attention: Attention) -> None:
    x = torch.randn(4, 64)
    want = attention(x)  # chooses
    calls.clear()
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    assert calls == [(4, 64)]
    torch.testing.assert_close(compiled(x + 1), attention(x + 1))
    torch._dynamo.reset()


def test_moving_the_model_chooses_again(attention: Attention) -> None:
    x = torch.randn(4, 64)
    want = attention(x)
    attention.to(torch.float64)
    assert attention.q.site._kernel is None
    assert attention.q.weight_packed.dtype == torch.uint8
    torch.testing.assert_close(attention(x), want)


def test_saving_still_finds_the_packed_tensors(attention: Attention) -> None:
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    attention(torch.randn(1, 64))
    after = attention.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
