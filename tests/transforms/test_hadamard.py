"""Hadamard matrices: every size the supported models have, exact, and the fast transform."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.transforms import hadamard

# Hidden and intermediate sizes by model, and the product of base orders that builds each.
# The products are part of the packed format: they may be added to, never changed.
SIZES = {
    "Llama 2": {4096: (4096,), 5120: (20, 256), 8192: (8192,), 11008: (344, 32)}
    | {13824: (12, 12, 12, 8), 28672: (28, 1024)},
    "Llama 3": {2048: (2048,), 3072: (12, 256), 14336: (28, 512), 16384: (16384,)}
    | {53248: (52, 1024)},
    "Qwen2 and 2.5": {896: (28, 32), 4864: (76, 64), 1536: (12, 128), 8960: (20, 28, 16)}
    | {3584: (28, 128), 18944: (148, 128), 27648: (12, 12, 12, 16), 29568: (12, 28, 44, 2)}
    | {2560: (20, 128), 20480: (20, 1024)},
    "Qwen3": {1024: (1024,), 6144: (12, 512), 9728: (76, 128), 12288: (12, 1024)}
    | {17408: (68, 256), 25600: (20, 20, 64), 768: (12, 64)},
    "Mistral": {32768: (32768,)},
    "SmolLM": {576: (12, 12, 4), 960: (12, 20, 4), 64: (64,), 128: (128,)},
    "Phi-3": {17920: (20, 28, 32), 96: (12, 8)},
    "Gemma": {24576: (12, 2048), 2304: (12, 12, 16), 9216: (12, 12, 64), 4608: (12, 12, 32)}
    | {36864: (12, 12, 256), 640: (20, 32), 1152: (12, 12, 8), 6912: (12, 12, 12, 4)}
    | {10240: (20, 512), 3840: (12, 20, 16), 15360: (12, 20, 64), 5376: (12, 28, 16)}
    | {21504: (12, 28, 64), 256: (256,)},
}
ALL = {size: orders for model in SIZES.values() for size, orders in model.items()}


@pytest.mark.parametrize("size", sorted(ALL))
def test_every_model_size_is_constructed_by_its_recorded_product(size: int) -> None:
    assert hadamard.factors(size) == ALL[size]
    assert hadamard.largest_size(size) == size


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 52, 60, 76, 84, 100, 108, 140, 148, 344])
def test_base_matrices_satisfy_h_ht_equals_n_i(order: int) -> None:
    # 28, 344: GF(27), GF(343); 52, 100: type II over GF(25), GF(49).
    h = hadamard._paley(order)
    assert set(h.unique().tolist()) == {-1, 1}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("size", [2, 32, 64, 576, 896, 960, 1536, 2752])
def test_fast_transform_is_the_dense_product(size: int) -> None:
    h = hadamard.matrix(size)
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))
    x = torch.randn(3, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = (x.view(3, 2, size) @ h / size**0.5).view(3, 2 * size)
    torch.testing.assert_close(hadamard.rotate(x, size), dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard.rotate_back(dense, size), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", sorted(ALL))
def test_rotating_both_sides_of_a_product_changes_nothing(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, size, dtype=torch.float64, generator=generator)
    w = torch.randn(3, size, dtype=torch.float64, generator=generator)
    y = hadamard.rotate(x, size) @ hadamard.rotate(w, size).T
    torch.testing.assert_close(y, x @ w.T, rtol=1e-12, atol=1e-12 * size**0.5)


def test_sizes_without_a_construction_fall_back_to_the_largest_block() -> None:
    for size in (92, 116, 156, 172, 188):  # Williamson type: not reachable by Paley
        assert hadamard.factors(size) is None
    assert hadamard.largest_size(172) == 4
    assert hadamard.largest_size(232) == 8
    assert hadamard.largest_size(7) == 1
    with pytest.raises(QuantkitError, match="172"):
        hadamard.rotate(torch.ones(172), 172)
    with pytest.raises(QuantkitError, match="does not divide"):
        hadamard.rotate(torch.ones(100), 64)


def test_halves_are_computed_in_float32_and_gradients_flow() -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    half = hadamard.rotate(x.bfloat16(), 96)
    assert half.dtype == torch.bfloat16
    exact = hadamard.rotate(x.bfloat16().double(), 96)
    torch.testing.assert_close(half.double(), exact.bfloat16().double(), rtol=2**-7, atol=1e-6)
    x.requires_grad_()
    (hadamard.rotate(x, 32) ** 2).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-5)
