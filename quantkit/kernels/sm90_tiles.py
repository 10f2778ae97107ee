"""Hopper tiles: which shape of kernel runs N outputs, K columns, M tokens, on how many CTAs.

Reading weights is the limit up to 64 tokens, so a plan wants every multiprocessor busy to the end:
tiles that divide among them, or the split (stream-K) schedule. Figures behind each choice were
measured on an H200 with `benchmarks/gemm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels.prepare import ROWS


@dataclass(frozen=True)
class Tile:
    """Parameters of `Tile` in `sm90_gemm.cuh`: tokens, 64-row groups, groups along K that add up at
    the end, bricks a group takes per pipeline stage, stages."""

    tokens: int
    row_groups: int
    k_groups: int
    bricks: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """A tile, the CTAs that run it, and whether tiles are split among them (stream-K)."""

    tile: Tile
    ctas: int
    split: bool


# One line a tile. Decode: all four warpgroups on one 64-row block (short N), or on more rows.
TILES = (
    Tile(8, 1, 4, 2, 4),
    Tile(16, 1, 4, 1, 8),
    Tile(16, 1, 4, 2, 4),
    Tile(32, 1, 4, 1, 5),
    Tile(32, 3, 1, 2, 6),
    Tile(32, 4, 1, 2, 4),
    Tile(64, 1, 4, 1, 3),
    Tile(64, 2, 2, 1, 5),
    Tile(64, 3, 1, 2, 5),
    Tile(64, 4, 1, 2, 4),
    Tile(256, 2, 1, 1, 4),
)
PREFILL = 192  # more tokens than this take the 256-token tile

WEIGHT_STRUCTS = {"mxfp4": "Mxfp4<cutlass::float_e5m2_t>"}
BRANCH_STRUCTS = {None: "NoBranch", "bf16": "Bf16Branch", "fp8": "Fp8Branch"}


def token_tile(tokens: int) -> int:
    """Tokens a tile holds; only their number decides, so that linears can share operands."""
    return 256 if tokens > PREFILL else next(t for t in (8, 16, 32, 64) if tokens <= t or t == 64)


def plan(outputs: int, width: int, tokens: int, sms: int = 132) -> Plan:
    """Choose tile and grid for N = `outputs`, K = `width`, M = `tokens` on `sms` SMs."""
    blocks = -(-outputs // ROWS)
    size = token_tile(tokens)
    token_tiles = -(-tokens // size)
    if size == 256:
        tiles = -(-blocks // 2) * token_tiles
        return Plan(_tile(256, 2), min(sms, tiles), False)
    # More rows a CTA read the tokens less often; fewer rows divide better.
    if size <= 16 or (blocks <= sms and not (size == 64 and blocks <= sms // 2)):
        rows = 1
    elif blocks <= sms // 2:
        rows = 2
    else:
        rows = 3 if blocks % 3 == 0 else 4
    deep = size == 16 and blocks * width > 128 * 12288
    tile = _tile(size, rows, 2 if deep else None)
    tiles = -(-blocks // rows) * token_tiles
    rounds = -(-tiles // sms)
    if tiles / (rounds * sms) >= 0.7:
        return Plan(tile, -(-tiles // rounds), False)
    steps = tiles * -(-width // (128 * tile.k_groups * tile.bricks))
    return Plan(tile, min(sms - sms % 8, steps), True)


def _tile(tokens: int, rows: int, bricks: int | None = None) -> Tile:
    return next(
        t
        for t in TILES
        if t.tokens == tokens and t.row_groups == rows and bricks in (None, t.bricks)
    )


def gemm_text(tile: Tile, weights: str, branch: str | None) -> str:
    """The source of one GEMM: an include and an instantiation."""
    numbers = (tile.tokens, tile.row_groups, tile.k_groups, tile.bricks, tile.stages)
    parts = (WEIGHT_STRUCTS[weights], BRANCH_STRUCTS[branch], *map(str, numbers))
    return f'#include "sm90_gemm.cuh"\nQUANTKIT_SM90_GEMM(run, {", ".join(parts)})\n'


def activation_text(dtype: str) -> str:
    """The source of the activation kernel for inputs in `dtype` (bf16, fp16)."""
    element = {"bf16": "__nv_bfloat16", "fp16": "__half"}[dtype]
    return f'#include "sm90_activation.cuh"\nQUANTKIT_SM90_ACTIVATION(run, {element})\n'
