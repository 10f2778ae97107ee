"""Scale tiles: the order is CuTe's, byte for byte."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch

from quantkit.kernels import jit
from quantkit.kernels.scale_layout import from_tiles, tile_bytes, to_tiles

GOLDEN = Path(__file__).parent.parent / "golden" / "blackwell_scale_layout.json"
SHAPES = ((1, 1), (128, 4), (129, 5), (37, 12), (300, 9), (512, 32))


def by_definition(rows: int, blocks: int) -> list[list[int]]:
    """Offsets from the layout ((32, 4), 4):((16, 4), 1), tiles with the blocks of k fastest."""
    across = -(-blocks // 4)
    return [
        [
            ((row // 128) * across + block // 4) * 512
            + (row % 32) * 16
            + (row % 128 // 32) * 4
            + block % 4
            for block in range(blocks)
        ]
        for row in range(rows)
    ]


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_every_scale_lands_at_its_offset_and_padding_is_zero(rows: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8, generator=generator)
    tiles = to_tiles(scale)
    assert tiles.numel() == tile_bytes(rows, blocks)
    expected = torch.zeros(tile_bytes(rows, blocks), dtype=torch.uint8)
    expected[torch.tensor(by_definition(rows, blocks)).flatten()] = scale.flatten()
    assert torch.equal(tiles.flatten(), expected)
    assert torch.equal(from_tiles(tiles, rows, blocks), scale)


def test_float8_scales_keep_their_bytes() -> None:
    scale = torch.tensor([[0.5, 1.0], [2.0, 448.0]]).to(torch.float8_e4m3fn)
    assert torch.equal(from_tiles(to_tiles(scale), 2, 2), scale.view(torch.uint8))


def test_offsets_are_the_ones_cutlass_prints() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["cutlass"]
    for case in golden["cases"]:
        assert case["offsets"] == by_definition(case["rows"], case["blocks"])


CUTE = """#include "cutlass/detail/sm100_blockscaled_layout.hpp"
template <int Vector> int offset(int rows, int k, int row, int column) {
  auto shape = cute::make_shape(rows, rows, k, 1);
  auto layout = cutlass::detail::Sm1xxBlockScaledConfig<Vector>::tile_atom_to_shape_SFA(shape);
  return layout(row, column, 0);
}
extern "C" int offset32(int rows, int k, int row, int column) {
  return offset<32>(rows, k, row, column);
}
extern "C" int offset16(int rows, int k, int row, int column) {
  return offset<16>(rows, k, row, column);
}
"""


@pytest.mark.parametrize("vector", [16, 32])
def test_cute_itself_agrees(vector: int) -> None:
    try:
        jit.toolchain()
    except jit.MissingCompiler as error:
        pytest.skip(error.message)
    offset = getattr(jit.load(CUTE, "scale_layout", "sm_90a"), f"offset{vector}")
    offset.argtypes = [ctypes.c_int] * 4
    for rows, blocks in SHAPES:
        expected = by_definition(rows, blocks)
        for row in range(0, rows, 7):
            for block in range(blocks):
                column = block * vector + (row * 5) % vector  # any value of the block
                assert offset(rows, blocks * vector, row, column) == expected[row][block]
