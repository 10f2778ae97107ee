"""The order in which Blackwell's block-scaled MMA reads scales: tiles of 128 rows x 4 blocks.

CUTLASS describes it as `Sm1xxBlockScaledConfig::SfAtom`, the layout ((32, 4), (vector, 4)) with
strides ((16, 4), (0, 1)), repeated with the blocks of k running fastest. A tile is 512 bytes;
rows and blocks are padded to whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, BLOCKS = 128, 4


def to_tiles(scale: Tensor) -> Tensor:
    """Reorder scales [rows, blocks] (any one-byte type) to uint8 tiles [rows/128, blocks/4, 512].

    Padding is zero: an MMA over padded columns of k multiplies it with zero codes.
    """
    rows, blocks = scale.shape
    scale = pad(scale.view(torch.uint8), (0, -blocks % BLOCKS, 0, -rows % ROWS))
    tiles = scale.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, BLOCKS))  # [R, 4, 32, B, 4]
    return tiles.permute(0, 3, 2, 1, 4).flatten(2).contiguous()


def from_tiles(tiles: Tensor, rows: int, blocks: int) -> Tensor:
    """Undo `to_tiles`: uint8 [rows, blocks]."""
    parts = tiles.unflatten(-1, (32, 4, BLOCKS))  # [R, B, 32, 4, 4]
    return parts.permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)[:rows, :blocks].contiguous()


def tile_bytes(rows: int, blocks: int) -> int:
    """Size of the tiles of [rows, blocks] scales."""
    return -(-rows // ROWS) * -(-blocks // BLOCKS) * ROWS * BLOCKS
