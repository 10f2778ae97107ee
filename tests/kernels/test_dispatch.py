"""The choice of a kernel: by device and format, said once, never silent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from quantkit.errors import UsageError
from quantkit.kernels import capability, dispatch, generate, jit

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
WORK = dispatch.Work("mxfp4", "mxfp4", "bf16", "even", None, 256, (64, 32, 32), 16)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def on(gpu: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: gpu)


def test_every_row_names_a_module_with_both_functions() -> None:
    for row in capability.KERNELS:
        module = dispatch._module(row)
        assert callable(module.refuse)
        assert callable(module.prepare)
        assert row.arch == f"sm_{row.capability[0]}{row.capability[1]}a"
        assert row.capability in capability.GPUS
        assert (row.weights, row.activations) in capability.PAIRS


def test_rows_are_told_apart_by_what_they_run() -> None:
    keys = [(row.capability, row.weights, row.activations) for row in capability.KERNELS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("gpu", [(10, 0), (12, 0)])
@pytest.mark.parametrize("pair", capability.PAIRS)
def test_blackwell_runs_every_pair(
    gpu: tuple[int, int], pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(gpu, monkeypatch)
    choice = dispatch.choose(replace(WORK, weights=pair[0], activations=pair[1]), CUDA)
    assert choice.name == f"sm{gpu[0]}{gpu[1]} block-scaled"
    assert choice.reason == ""


@pytest.mark.parametrize("pair", [("nvfp4", "nvfp4"), ("mxfp4", "mxfp8"), ("mxfp8", "mxfp8")])
def test_hopper_runs_other_pairs_in_bfloat16(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on((9, 0), monkeypatch)
    work = replace(WORK, weights=pair[0], activations=pair[1])
    for branch in (None, "bf16", "fp8"):
        for hadamard in (None, {"block": 32}, {"size": 256}):
            choice = dispatch.choose(replace(work, branch=branch, hadamard=hadamard), CUDA)
            assert choice.name == "sm90 bf16"
            assert choice.reason == ""


@pytest.mark.parametrize(
    ("gpu", "change", "reason"),
    [
        (None, {}, "no CUDA device"),
        ((8, 9), {}, "no kernel for compute capability 8.9"),
        ((10, 0), {"weights": "nvfp4"}, "no nvfp4 x mxfp4 kernel"),
        ((9, 0), {"branch": "residual", "hadamard": {"block": 32}}, "residual branch of a rotated"),
        ((10, 0), {"branch": "residual"}, "multiple of 32, not 272"),
        ((10, 0), {"width": 48}, "multiple of 32, not 48"),
        ((10, 0), {"activations": "mxfp8", "width": 64}, "multiple of 128, not 64"),
        ((10, 0), {"outputs": (5, 4)}, "multiple of 8 outputs, not 9"),
        ((10, 0), {"rule": "mse"}, "no scale rule 'mse'"),
        ((10, 0), {"hadamard": {"size": 256}}, "blocks of 32 only"),
        ((10, 0), {"dtype": torch.float32}, "not torch.float32"),
    ],
)
def test_a_refusal_has_a_reason(
    gpu: tuple[int, int] | None,
    change: dict[str, object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(gpu, monkeypatch)
    choice = dispatch.choose(replace(WORK, **change), CUDA)
    assert choice.name == "reference"
    assert reason in choice.reason


def test_a_fall_back_is_said_once_for_each_reason_and_recorded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for layer in range(3):
        assert dispatch.prepare(f"layers.{layer}.attn_in", WORK, [], CPU) is None
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert "reference: no CUDA device" in said
    assert list(dispatch.report()) == [f"layers.{layer}.attn_in" for layer in range(3)]
    assert dispatch.report()["layers.0.attn_in"] == {
        "formats": "mxfp4 x mxfp4",
        "branch": "bf16",
        "kernel": "reference",
        "reason": "no CUDA device",
    }
    assert dispatch.summary() == {"reference": 3}


def test_the_user_may_force_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on((10, 0), monkeypatch)
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")
    assert dispatch.prepare("layers.0.mlp_in", WORK, [], CUDA) is None
    assert "QUANTKIT_KERNEL=reference" in capsys.readouterr().err
    monkeypatch.setenv("QUANTKIT_KERNEL", "fastest")
    with pytest.raises(UsageError, match="fastest"):
        dispatch.choose(WORK, CUDA)


def test_a_missing_compiler_falls_back_with_the_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on((10, 0), monkeypatch)

    def missing(*_: object) -> object:
        raise jit.MissingCompiler("no CUDA compiler", "pip install nvidia-cuda-nvcc")

    monkeypatch.setattr(dispatch._module(capability.KERNELS[0]), "prepare", missing)
    assert dispatch.prepare("layers.0.mlp_in", WORK, [], CUDA) is None
    said = capsys.readouterr().err
    assert "no CUDA compiler" in said
    assert "pip install nvidia-cuda-nvcc" in said
    assert dispatch.report()["layers.0.mlp_in"]["kernel"] == "reference"


def test_tiles_widen_with_the_tokens() -> None:
    row = capability.find("mxfp4", "mxfp4", None, (10, 0))
    assert isinstance(row, capability.Kernel)
    tiles = [generate.blockscaled_tile(row, tokens) for tokens in (1, 64, 65, 512, 513, 100_000)]
    assert [tile.tokens for tile in tiles] == [64, 64, 128, 128, 256, 256]
