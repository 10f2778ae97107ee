"""The peer humming-kernels: what it multiplies and is checked for, and runs without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gemm
from quantkit.errors import QuantkitError
from quantkit.formats import mxfp4
from quantkit.kernels import bench, bench_humming

CPU = torch.device("cpu")
Product = Callable[[Tensor, Tensor], Tensor]


def quantize(_: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the library: torch's product of what its layer was given."""
    found = SimpleNamespace(product=lambda x, weight: x @ weight.T, tiles=[])

    class Layer(nn.Module):
        def __init__(self, outputs: int, width: int, **configs: Any) -> None:
            super().__init__()
            found.shape, found.configs = (outputs, width), configs
            self.humming_config = "config"

        def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
            self.weight = mxfp4.dequantize(tensors["weight"], tensors["weight_scale"])

        def transform(self) -> None:
            pass

        def forward(
            self, x: Tensor, input_scale: Tensor | None = None, tuning_config: Any = None
        ) -> Tensor:
            found.tiles.append(tuning_config)
            codes, scale = quantize(None, x) if input_scale is None else (x, input_scale)
            return found.product(codes.float() * scale, self.weight).bfloat16()

    for name, members in {
        "forward": {"may_quant_input": quantize},
        "layer": {"HummingLayer": Layer},
        "tune": {"get_heuristics_config": lambda config, shape_m, device: {"M": shape_m}},
    }.items():
        module = ModuleType(f"humming.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setattr(bench_humming, "version", lambda: "1.0")
    monkeypatch.setattr(bench, "COLD_BYTES", 3 * 64 * 34)  # three copies of 64 x 64
    return found


def timer(calls: Any) -> float:
    return float(len([call() for call in calls]))


def test_the_product_is_timed_on_copies_of_the_weights(library: SimpleNamespace) -> None:
    calls = bench.PEERS["humming"](64, 64, CPU)
    assert library.shape == (64, 64)
    assert library.configs["weight_config"] == {"quant_method": "mxfp4"}
    assert library.configs["input_config"] == {"dtype": "float8e4m3"}
    for tokens in (1, 5):
        library.tiles.clear()
        times = calls(torch.randn(tokens, 64).bfloat16(), timer)
        assert times["gemm"] == times["chain"] == 3.0
        assert 0 < times["error"] < 3e-3  # bfloat16's
        assert library.tiles == [{"M": tokens}] * 7


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda x, weight: 1.1 * (x @ weight.T), "1.0e-01 off"),
        (lambda x, weight: x @ weight.T * float("nan"), "nan off"),
        (lambda x, weight: x @ weight, "RuntimeError"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    library: SimpleNamespace, product: Product, message: str
) -> None:
    calls = bench.PEERS["humming"](96, 64, CPU)
    library.product = product
    with pytest.raises(QuantkitError, match=message) as caught:
        calls(torch.randn(3, 64).bfloat16(), timer)
    assert "\n" not in caught.value.message
    failed = gemm.attempt("humming", lambda: calls(torch.randn(3, 64).bfloat16(), timer))
    assert message in failed["failed"]


def test_without_it_the_benchmark_has_torchs_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_humming, "version", lambda: None)
    assert gemm.default_peers() == ["fp8", "bf16"]
    with pytest.raises(QuantkitError, match="no humming-kernels") as caught:
        bench.PEERS["humming"](64, 64, CPU)
    assert caught.value.hint == "pip install humming-kernels"


def cell(**peers: dict[str, Any]) -> dict[str, Any]:
    us = {"plain": 4.0, "overlapped": 3.0, "chain": 8.0, "activation": 1.0}
    return {
        "outputs": 64, "width": 32, "tokens": 1, "branch": None, "group": 0, "us": us, "norm": {},
        "roofline_us": 2.0, "activation_bytes": 64, "error": 1e-3, "repeats": True, "peers": peers,
    }  # fmt: skip


def test_its_times_and_failures_have_columns_of_their_own() -> None:
    fp8 = {"chain": 9.0, "gemm": 5.0}
    times = {"chain": 12.0, "gemm": 6.0, "error": 1e-3}
    cells = [
        cell(fp8=fp8, humming=times),
        cell(fp8=fp8, humming={"failed": "no tile | " + 99 * "x"}),
    ]
    lines = gemm.as_table({"bandwidth": 1e12, "cells": cells}, gemm.markdown).splitlines()
    headers, first, second = ([part.strip() for part in lines[i].split("|")] for i in (0, 2, 3))
    assert len(headers) == len(first) == len(second)
    place = headers.index("W4A8 us")
    assert headers[place + 1 : place + 3] == ["x W4A8", "x W4A8 chain"]
    assert first[place : place + 3] == ["6.0", "1.50", "1.50"]
    assert second[place : place + 3] == ["no tile / " + 70 * "x", "-", "-"]
    alone = gemm.as_table({"bandwidth": 1e12, "cells": [cell(fp8=fp8)]}, gemm.markdown)
    assert "W4A8" not in alone
