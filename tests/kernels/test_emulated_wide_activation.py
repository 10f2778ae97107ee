"""The activation kernel of Hopper's products in bfloat16, run on a CPU (see test_emulated.py)."""

from __future__ import annotations

import shutil

import pytest
import torch

from quantkit.kernels import sm90_wide
from quantkit.kernels.sm90_wide_activation import Recipe
from tests.kernels.test_emulated import EXACT, Emulator, emulator, run_on
from tests.kernels.test_sm90 import relative_error
from tests.kernels.test_sm90_wide import wide_layer, wide_work
from tests.kernels.test_sm90_wide_activation import (
    BRANCHES,
    FORMATS,
    Operands,
    both,
    check_equal,
    check_near,
    ordinary,
    rows,
)

__all__ = ["emulator"]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("activations", FORMATS)
def test_the_kernel_gives_torchs_bits(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    activations: str,
    branch: str | None,
    dtype: torch.dtype,
) -> None:
    run_on(emulator, monkeypatch)
    recipe = Recipe(activations, "even", 0, branch)
    for tokens, width in ((1, 96), (9, 2144), (16, 416)):
        width -= 16 * (activations == "nvfp4")  # an odd number of blocks
        for divisor in (37.5, 448.0, 3e-7, 1e30, 3e-39):
            x = rows(tokens, width, dtype, first=3)
            check_equal(both(x, recipe, divisor), (tokens, width, divisor))


@pytest.mark.parametrize("rule", ["floor", "even4", "ceil", "rceil"])
def test_scale_rules(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    run_on(emulator, monkeypatch)
    check_equal(both(rows(24, 96, torch.bfloat16), Recipe("mxfp8", rule, 0, "fp8")))


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("hadamard", [32, 64, 512])
def test_rotations(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, activations: str, hadamard: int
) -> None:
    run_on(emulator, monkeypatch)
    pair = both(ordinary(11, 3072), Recipe(activations, "even", hadamard, "fp8"))
    check_near(pair, 2e-4)
    check_equal((Operands(pair[1].main, pair[0].branch, pair[0].scales), pair[1]))


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_swiglu(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, activations: str, branch: str | None
) -> None:
    run_on(emulator, monkeypatch)
    x = torch.randn(5, 2 * 1056, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_near(both(x, Recipe(activations, "even", 0, branch), gated=True), 2e-3)


@pytest.mark.parametrize("width", [1024, 8192, 16384, 32768])  # one, two, four units a thread
def test_rms_norm(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Bit for bit where float32 adds the squares exactly in any order."""
    run_on(emulator, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-32, 33, (3, width), generator=generator).bfloat16()
    gain = (1 + torch.randn(width, generator=generator) / 4).bfloat16()
    for activations, branch in (("nvfp4", "fp8"), ("nvfp4", None), ("mxfp8", "bf16")):
        check_equal(both(x, Recipe(activations, "even", 0, branch), norm=(gain, 1e-6)), branch)
    x = torch.randn(3, width, generator=generator).bfloat16()
    check_near(both(x, Recipe("nvfp4", "even", 0, "fp8"), norm=(gain, 1e-6)), 1e-2)


@pytest.mark.parametrize("branch", BRANCHES)
def test_products_of_what_the_kernel_writes(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, branch: str | None
) -> None:
    run_on(emulator, monkeypatch)
    monkeypatch.setattr(sm90_wide, "on_gpu", lambda x: True)
    task = wide_work(("nvfp4", "nvfp4"), 416, (64, 6), branch)
    site = [wide_layer(task, n, seed) for seed, n in enumerate(task.outputs)]
    module = sm90_wide.WideLinear(task, [tensors for tensors, _ in site])
    x = rows(9, 416, torch.bfloat16)[[0, 4, 8]]
    wanted = torch.cat([expected(x) for _, expected in site], 1)
    y = module.multiply(*module.quantize(x), torch.float32)
    assert relative_error(y, wanted) <= EXACT
    gain = x[2].abs()
    assert module.normed(x, gain, 1e-6).shape == module.gated(torch.cat([x, x], 1)).shape == (3, 70)
