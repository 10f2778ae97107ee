"""Hopper's products in bfloat16, their own source run on a CPU (see test_emulated.py)."""

from __future__ import annotations

import shutil

import pytest
import torch

from quantkit.kernels import dispatch, reference, residual, sm90_tiles, sm90_wide
from quantkit.kernels.sm90_tiles import Tile
from tests.kernels.test_emulated import EXACT, IN_PARTS, SMS, Emulator, emulator, inputs, run_on
from tests.kernels.test_residual import CHANNELS, WIDTH, format_of, packed
from tests.kernels.test_sm90 import relative_error
from tests.kernels.test_sm90_wide import BRANCHES, FORMATS, wide_layer, wide_work
from tests.runtime.test_gpu import packed_model
from tests.runtime.test_gpu import tokens as tokens_of

__all__ = ["emulator"]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def check(
    task: dispatch.Work,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    tile: Tile | None = None,
    divisor: float | None = 37.5,
) -> None:
    """The product is exact up to its sum, the same again, by `tile` and by that of the plan."""
    site = [wide_layer(task, n, seed, "cpu", divisor) for seed, n in enumerate(task.outputs)]
    module = sm90_wide.WideLinear(task, [tensors for tensors, _ in site])
    x = inputs(tokens, task.width)
    wanted = torch.cat([expected(x) for _, expected in site], 1)
    operands = module.quantize(x)
    if tile is None:
        y = module.multiply(*operands, torch.float32)
        assert relative_error(y, wanted) <= EXACT
        assert torch.equal(y, module.multiply(*operands, torch.float32))
        tile = sm90_tiles.plan(sum(task.outputs), task.width, tokens, SMS).tile
    monkeypatch.setattr(sm90_tiles, "careful", lambda tile: tile)  # that of 16-bit results
    with sm90_tiles.trying(tile):
        y = module.multiply(*operands, torch.float32)
        assert relative_error(y, wanted) <= EXACT
        assert torch.equal(y.bfloat16(), module(x))


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(
    ("width", "outputs", "tokens"), [(512, (128, 60), 5), (1120, (192,), 16), (672, (320,), 270)]
)
def test_products_in_bfloat16_are_exact_up_to_their_sum(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    formats: tuple[str, str],
    width: int,
    outputs: tuple[int, ...],
    tokens: int,
    branch: str | None,
) -> None:
    run_on(emulator, monkeypatch)
    check(wide_work(formats, width, outputs, branch), tokens, monkeypatch)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("hadamard", [None, {"block": 32}, {"size": 576}])
def test_divisors_of_the_moment_and_rotations(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    branch: str | None,
    hadamard: dict[str, int] | None,
) -> None:
    run_on(emulator, monkeypatch)
    task = wide_work(("nvfp4", "nvfp4"), 576, (64,), branch, hadamard)
    check(task, 4, monkeypatch, divisor=None)


@pytest.mark.parametrize("hadamard", [None, {"block": 32}])
def test_a_residual_behind_the_input_is_computed_as_the_reference_does(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, hadamard: dict[str, int] | None
) -> None:
    run_on(emulator, monkeypatch)
    fmt = format_of("nvfp4", hadamard)
    generator = torch.Generator().manual_seed(3)
    tensors = packed(torch.randn(64, WIDTH, generator=generator) / 11, fmt)
    work = dispatch.Work("nvfp4", "nvfp4", "residual", "even", hadamard, WIDTH, (64,), fmt.outliers)
    inner = sm90_wide.WideLinear(residual.widened(work), [tensors])
    module = residual.ResidualLinear(work, [tensors], inner)
    x = inputs(5, WIDTH)
    operand = reference.input_operand(
        x.float() if hadamard else x, fmt, "even", CHANNELS, tensors["input_global_scale"]
    )
    wanted = operand.double() @ reference.dequantized_weight(tensors, fmt).double().T
    y = inner.multiply(*inner.quantize(module.with_residual(x)), torch.float32)
    assert relative_error(y, wanted) <= EXACT
    assert module(x).dtype == torch.bfloat16
    assert torch.equal(module(x), inner.multiply(*inner.quantize(module.with_residual(x))))


@pytest.mark.parametrize(("branch", "rotation"), [("fp8", 0), ("bf16", 32), ("residual", 32)])
def test_a_model_gives_what_it_gives_by_the_reference(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, branch: str, rotation: int
) -> None:
    """Bit for bit: sums of these few terms are the same in any order, rounded to bfloat16."""
    run_on(emulator, monkeypatch)
    monkeypatch.setattr(sm90_wide.jit, "compile", lambda *_: None)
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    logits = []
    for kernel, name in (("auto", "sm90 bf16"), ("reference", "reference")):
        monkeypatch.setenv("QUANTKIT_KERNEL", kernel)
        dispatch.forget()
        model = packed_model(branch, "nvfp4", rotation, "cpu")
        with torch.no_grad():
            logits.append(model(tokens_of(2, 3, "cpu")).logits)
        assert set(dispatch.summary()) == {name}
    dispatch.forget()
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("width", "outputs", "branch", "tokens", "tile"),
    [
        (2048, (704,), "fp8", 5, Tile(8, 3, 1, 2, 6, 2048)),  # split tiles
        (1664, (704,), "bf16", 16, Tile(16, 3, 1, 2, 6, 2048)),
        (1024, (320,), "fp8", 20, Tile(32, 1, 4, 1, 5, 512, 2)),  # in clusters of two
        (1024, (320,), "bf16", 40, Tile(64, 3, 1, 2, 5, 2048, 2)),
        (2496, (320,), "fp8", 270, Tile(256, 2, 1, 1, 5, 1024, 2)),  # long sums
        (1472, (192,), "bf16", 300, Tile(256, 2, 1, 1, 5, 1024, 2)),
        (640, (192,), "bf16", 300, Tile(256, 2, 1, 1, 4)),
    ],
)
def test_tiles_with_a_branch_are_exact_up_to_their_sum(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    outputs: tuple[int, ...],
    branch: str | None,
    tokens: int,
    tile: Tile,
) -> None:
    run_on(emulator, monkeypatch)
    check(wide_work(("nvfp4", "nvfp4"), width, outputs, branch), tokens, monkeypatch, tile)


@pytest.mark.parametrize("tile", IN_PARTS, ids=lambda t: f"{t.tokens}-{t.row_groups}-{t.parts}")
@pytest.mark.parametrize("branch", BRANCHES)
def test_parts_of_a_cluster_are_exact_up_to_their_sum(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tile: Tile, branch: str | None
) -> None:
    run_on(emulator, monkeypatch)
    task = wide_work(("nvfp4", "nvfp4"), 672, (192,), branch)
    check(task, tile.tokens - 3, monkeypatch, tile)
