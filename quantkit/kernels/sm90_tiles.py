"""Hopper tiles: which shape of kernel runs N outputs, K columns, M tokens, on how many CTAs.

Reading weights is the limit up to 64 tokens, so a plan wants every multiprocessor busy to the end:
tiles that divide among them, or the split (stream-K) schedule. Figures behind each choice were
measured on an H200 with `benchmarks/gemm.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

from quantkit.kernels.prepare import ROWS


@dataclass(frozen=True)
class Tile:
    """Parameters of `Tile` in `sm90_schedule.cuh`: tokens, 64-row groups, groups along K that add
    up at the end, bricks a group takes per pipeline stage, stages, the columns after which running
    sums move to FP32 (more than 512 in prefill: none, where that loses nothing), CTAs that fetch
    tokens for one another, and CTAs of a cluster that share a tile, each with a part of K."""

    tokens: int
    row_groups: int
    k_groups: int
    bricks: int
    stages: int
    promote: int = 512
    cluster: int = 1
    parts: int = 1


@dataclass(frozen=True)
class Plan:
    """A tile, the CTAs that run it, and whether tiles are split among them (stream-K)."""

    tile: Tile
    ctas: int
    split: bool


# One line a tile. Decode: all four warpgroups on one 64-row block (short N), or on more rows; in
# parts where one round of clusters keeps the SMs busy.
TILES = (
    Tile(8, 1, 4, 2, 4),
    Tile(8, 1, 4, 2, 5, 2048, parts=2),
    Tile(8, 3, 1, 2, 6, 2048),
    Tile(16, 1, 4, 1, 8),
    Tile(16, 1, 4, 2, 4),
    Tile(16, 1, 4, 1, 8, 2048, parts=2),
    Tile(16, 3, 1, 2, 6, 2048),
    Tile(32, 1, 4, 1, 5),
    Tile(32, 1, 4, 1, 5, 2048, parts=2),
    Tile(32, 3, 1, 2, 6),
    Tile(32, 4, 1, 2, 4),
    Tile(64, 1, 4, 1, 3),
    Tile(64, 2, 2, 1, 5),
    Tile(64, 2, 2, 1, 5, 2048, parts=2),
    Tile(64, 2, 2, 1, 4, 2048, parts=3),
    Tile(64, 3, 1, 2, 5, 2048),
    Tile(256, 2, 1, 1, 5, 65536, 2),
)
# Tiles that no plan takes: right on an H200, but not faster there than those above.
CANDIDATES = (
    Tile(16, 2, 2, 1, 8, 2048, parts=2),
    Tile(32, 2, 2, 1, 7, 2048, parts=2),
    Tile(64, 3, 1, 2, 5, 2048, 2),
    Tile(64, 4, 1, 1, 6, 2048, parts=4),
)
PREFILL = 192  # more tokens than this take the 256-token tile

WEIGHT_STRUCTS = {
    "mxfp4": "Mxfp4<cutlass::float_e5m2_t>",
    "fp4 in bf16": "Fp4InBf16",
    "mxfp8 in bf16": "Mxfp8InBf16",
}
# Columns whose tokens take 128 bytes.
BRICK_COLUMNS = {"mxfp4": 128, "fp4 in bf16": 64, "mxfp8 in bf16": 64}
BRANCH_STRUCTS = {None: "NoBranch", "bf16": "Bf16Branch", "fp8": "Fp8Branch"}
# Where the row and token scales may be any numbers, by which bfloat16 has no exact quotient.
WIDE_BRANCH_STRUCTS = BRANCH_STRUCTS | {"bf16": "ScaledBf16Branch"}


def token_tile(tokens: int) -> int:
    """Tokens a tile holds; only their number decides, so that linears can share operands."""
    return 256 if tokens > PREFILL else next(t for t in (8, 16, 32, 64) if tokens <= t or t == 64)


def plan(outputs: int, width: int, tokens: int, sms: int = 132) -> Plan:
    """Choose tile and grid for N = `outputs`, K = `width`, M = `tokens` on `sms` SMs."""
    size = token_tile(tokens)
    tried = (tile for tile in _trial if tile.tokens == size)
    in_parts = (
        tile
        for tile in TILES
        if tile.tokens == size and tile.parts > 1 and suits(tile, outputs, width, tokens, sms)
    )
    tile = next(tried, None) or next(in_parts, None) or _choose(size, outputs, width, sms)
    return plan_of(tile, outputs, width, tokens, sms)


def _choose(size: int, outputs: int, width: int, sms: int) -> Tile:
    """The tile of one part for token tiles of `size`."""
    # More rows a CTA read the tokens less often; fewer rows divide better.
    blocks = -(-outputs // ROWS)
    if size == 256:
        return _tile(size, 2)
    if size <= 16:
        if 0.9 * sms <= -(-blocks // 3) <= sms:  # one round
            return _tile(size, 3)
        return _tile(size, 1, bricks=2 if size == 8 or blocks * width > 128 * 12288 else 1)
    if size == 32:
        return _tile(size, 1 if blocks <= sms else 3 if blocks % 3 == 0 else 4)
    if blocks <= sms // 2:
        return _tile(size, 2)
    return _tile(size, 1 if blocks <= sms and width <= 8192 else 3)


def plan_of(tile: Tile, outputs: int, width: int, tokens: int, sms: int = 132) -> Plan:
    """The grid for a tile: whole tiles when they keep the SMs busy, else the split schedule."""
    slots = sms // tile.cluster  # clusters at a time
    tiles = -(-outputs // (ROWS * tile.row_groups * tile.cluster)) * -(-tokens // tile.tokens)
    rounds = -(-tiles // slots)
    if tile.parts > 1:
        return Plan(tile, tiles * tile.parts, False)  # a cluster a tile
    if tile.tokens == 256:
        return Plan(tile, min(slots, tiles) * tile.cluster, False)
    if tiles / (rounds * slots) >= (0.7 if rounds == 1 else 0.9):
        return Plan(tile, -(-tiles // rounds) * tile.cluster, False)
    steps = tiles * -(-width // (128 * tile.k_groups * tile.bricks))
    return Plan(tile, min((sms - sms % 8) // tile.cluster, steps) * tile.cluster, True)


def suits(tile: Tile, outputs: int, width: int, tokens: int, sms: int = 132) -> bool:
    """Whether a tile of several parts has one round of clusters that keeps most SMs busy.

    Along a long K the split schedule costs less than the SMs that clusters leave out.
    """
    if tile.parts == 1:
        return True
    ctas = plan_of(tile, outputs, width, tokens, sms).ctas
    # SMs come in groups of fewer than 18, and a cluster of three or more does not fill each.
    resident = sms // tile.parts * (10 if tile.parts > 2 else 11) // 11
    steps = -(-width // (128 * tile.k_groups * tile.bricks))
    return 0.7 * sms <= ctas <= resident * tile.parts and 2 <= steps / tile.parts <= 32


_trial: list[Tile] = []


@contextmanager
def trying(tile: Tile) -> Iterator[None]:
    """Within it, plans for as many tokens as `tile` holds take `tile`: to time candidates."""
    _trial.append(tile)
    try:
        yield
    finally:
        _trial.remove(tile)


def _tile(tokens: int, rows: int, bricks: int | None = None) -> Tile:
    """The tile of one part with these parameters; None: whatever it has."""
    return next(
        t
        for t in TILES
        if (t.tokens, t.row_groups, t.parts) == (tokens, rows, 1) and bricks in (None, t.bricks)
    )


def careful(tile: Tile) -> Tile:
    """The tile for FP32 and fp16 results: sums move to FP32 more often than bfloat16 needs."""
    return replace(tile, promote=512, cluster=1) if tile.promote > 512 else tile


def gemm_text(tile: Tile, weights: str, branch: str | None) -> str:
    """The source of one GEMM: an include and an instantiation."""
    branches = BRANCH_STRUCTS if weights == "mxfp4" else WIDE_BRANCH_STRUCTS
    parts = (WEIGHT_STRUCTS[weights], branches[branch], *map(str, astuple(tile)))
    return f'#include "sm90_gemm.cuh"\nQUANTKIT_SM90_GEMM(run, {", ".join(parts)})\n'


def activation_text(dtype: str) -> str:
    """The source of the activation kernel for inputs in `dtype` (bf16, fp16)."""
    element = {"bf16": "__nv_bfloat16", "fp16": "__half"}[dtype]
    return f'#include "sm90_activation.cuh"\nQUANTKIT_SM90_ACTIVATION(run, {element})\n'


def wide_activation_text(dtype: str, activations: str) -> str:
    """The same of products in bfloat16, for activations in nvfp4 or mxfp8."""
    element = {"bf16": "__nv_bfloat16", "fp16": "__half"}[dtype]
    form = {"nvfp4": "kNvfp4", "mxfp8": "kMxfp8"}[activations]
    include = '#include "sm90_wide_activation.cuh"'
    return f"{include}\nQUANTKIT_SM90_WIDE_ACTIVATION(run, {element}, {form})\n"
