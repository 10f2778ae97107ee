"""`quantkit bench`: what it multiplies, what it reports, what it refuses. Nothing is timed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import mxfp4, nvfp4
from quantkit.kernels import bench, dispatch
from tests.test_cli import quantkit

CPU = torch.device("cpu")


class Halves(nn.Module):
    """A prepared linear that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("forward")
        return x

    def quantize(self, x: Tensor) -> tuple[Tensor]:
        return (x,)

    def multiply(self, x: Tensor) -> Tensor:
        self.calls.append("multiply")
        return x


def timer(calls: Sequence[Callable[[], object]]) -> float:
    for call in calls:
        call()
    return float(len(calls))


def test_each_cell_times_chain_and_gemm_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 3 * 64 * 34)  # three copies of 64 x 64 MXFP4
    monkeypatch.setattr(dispatch, "prepare", lambda *_: Halves())
    options = bench.Options(shapes=((64, 64),), tokens=(1, 5), peers=("bf16",))
    cells = list(bench.measure(options, CPU, timer, 1e12))
    assert [cell["tokens"] for cell in cells] == [1, 5]
    assert cells[0]["us"] == {"chain": 3.0, "gemm": 3.0}
    assert cells[0]["roofline_us"] == pytest.approx((64 * 34 + 2 * 128) / 1e12 * 1e6)
    assert set(cells[0]["peers"]["bf16"]) == {"chain", "gemm"}


def test_the_reference_is_not_timed_in_a_kernels_name(capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.Options(shapes=((64, 64),), peers=())
    with pytest.raises(QuantkitError, match="no CUDA device"):
        list(bench.measure(options, CPU, timer, 1e12))
    dispatch.forget()
    capsys.readouterr()


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
def test_the_random_linear_is_one_a_checkpoint_could_hold(branch: str | None) -> None:
    options = bench.Options(branch=branch, group=32)
    work, tensors = bench.packed_linear(options, 32, 640, CPU)
    weight = mxfp4.dequantize(tensors["weight_packed"], tensors["weight_scale"])
    assert weight.shape == (32, 640)
    assert weight.std() == pytest.approx(1.0, abs=0.05)
    if branch is None:
        assert set(tensors) == {"weight_packed", "weight_scale"}
        return
    assert work.outliers == 32  # 20 channels, padded to a multiple of 16
    assert tensors["outlier_index"].tolist() == [*range(0, 640, 32)] + [-1] * 12
    assert not tensors["outlier_weight"].float()[:, 20:].any()


def test_nvfp4_has_its_divisors() -> None:
    options = bench.Options(weights="nvfp4", activations="nvfp4")
    _, tensors = bench.packed_linear(options, 16, 64, CPU)
    parts = (tensors[name] for name in ("weight_packed", "weight_scale", "weight_global_scale"))
    assert nvfp4.dequantize(*parts).std() == pytest.approx(1.0, abs=0.1)
    assert "input_global_scale" in tensors


@pytest.mark.parametrize(
    "options",
    [
        bench.Options(weights="int4"),
        bench.Options(branch="int8"),
        bench.Options(peers=("triton",)),
    ],
)
def test_unknown_names_are_usage_errors(options: bench.Options) -> None:
    with pytest.raises(UsageError) as caught:
        bench.check(options)
    assert caught.value.hint


@pytest.mark.parametrize(
    "arguments", [("--shape", "4096"), ("--tokens", "0"), ("--tokens", "a"), ("--shape", "1,2,3")]
)
def test_the_command_line_refuses_what_is_no_number(arguments: tuple[str, str]) -> None:
    done = quantkit("bench", *arguments)
    assert done.returncode == 2
    assert "hint: write it like" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so() -> None:
    done = quantkit("bench")
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr


def test_the_table_has_ratios_and_the_file_is_json(tmp_path: Path) -> None:
    found = {
        "device": "a GPU",
        "bandwidth": 4e12,
        "weights": "mxfp4",
        "activations": "mxfp4",
        "branch": "bf16",
        "group": 32,
        "cells": [
            {
                "outputs": 64,
                "width": 32,
                "tokens": 1,
                "kernel": "sm90 exact-fold",
                "us": {"chain": 4.0, "gemm": 2.0},
                "roofline_us": 1.0,
                "peers": {"fp8": {"chain": 6.0, "gemm": 5.0}},
            }
        ],
    }
    lines = bench.as_text(found).splitlines()
    assert "bf16 branch 1/32" in lines[0]
    assert "sm90 exact-fold" in lines[0]
    assert lines[-1].split() == ["64,", "32", "1", "2.0", "4.0", "50%", "2.50", "1.50"]
    bench.write(found, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == found
