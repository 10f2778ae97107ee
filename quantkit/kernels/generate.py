"""Kernel sources: an include and one instantiation line filled with numbers, tiles by shape.

The device code is in the `.cuh` files; nothing here writes algorithm text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantkit.kernels import sm90_tiles
from quantkit.kernels.capability import KERNELS, Kernel

OUTPUTS = ("bf16", "fp16")


@dataclass(frozen=True)
class Source:
    """A compilable kernel: arguments of `jit.compile` and `jit.load`."""

    text: str
    name: str
    arch: str


@dataclass(frozen=True)
class Tile:
    """An MMA tile: output channels x tokens x k (elements)."""

    outputs: int
    tokens: int
    k: int


# Blackwell, 4-bit operands. sm100: 256 outputs are a pair of SMs. (tokens at most, tile), in order.
# k is 128 bytes of 4-bit operand a row on sm100; sm120 has the shared memory for half of it.
BLOCKSCALED_TILES: dict[str, tuple[tuple[int, Tile], ...]] = {
    "sm_100a": (
        (64, Tile(128, 64, 256)),
        (512, Tile(128, 128, 256)),
        (1 << 31, Tile(256, 256, 256)),
    ),
    "sm_120a": ((1 << 31, Tile(128, 128, 128)),),
}


def blockscaled_tile(kernel: Kernel, tokens: int) -> Tile:
    """Return the tile for `tokens` rows: the narrowest that holds them, then the fastest."""
    tile = next(tile for most, tile in BLOCKSCALED_TILES[kernel.arch] if tokens <= most)
    # An 8-bit operand (a 4-bit one beside it is widened on its way) fills twice the bytes.
    wide = "mxfp8" in (kernel.weights, kernel.activations)
    return Tile(tile.outputs, tile.tokens, min(tile.k, 128)) if wide else tile


def blockscaled_gemm(kernel: Kernel, tile: Tile, output: str, branch: bool) -> Source:
    """Instantiate the Blackwell block-scaled GEMM (`sm100_`, `sm120_blockscaled_gemm.cuh`)."""
    stem = kernel.arch[:-1].replace("_", "")
    arguments = ", ".join(
        (
            *(f"quantkit::{name}" for name in (kernel.weights, kernel.activations, output)),
            str(branch).lower(),
            *(str(extent) for extent in (tile.outputs, tile.tokens, tile.k)),
        )
    )
    text = (
        f'#include "{stem}_blockscaled_gemm.cuh"\n'
        f"QUANTKIT_EXPORT(quantkit::{stem.capitalize()}BlockScaledGemm<{arguments}>::type)\n"
    )
    return Source(text, f"{stem}_blockscaled_gemm", kernel.arch)


def quantize_act(
    arch: str, activations: str, dtype: str, rotate: bool, gated: bool = False
) -> Source:
    """Instantiate the activation kernel of the Blackwell GEMM (`sm1xx_quantize_act.cuh`)."""
    element = {"bf16": "__nv_bfloat16", "fp16": "__half"}[dtype]
    text = (
        '#include "sm1xx_quantize_act.cuh"\n'
        f"QUANTKIT_EXPORT_QUANTIZE({element}, quantkit::Format::{activations}, "
        f"{str(rotate).lower()}, {str(gated).lower()})\n"
    )
    return Source(text, "sm1xx_quantize_act", arch)


def sources(arch: str, pairs: Sequence[tuple[str, str]] | None = None) -> Iterator[Source]:
    """Yield every source that can be needed at run time on `arch` with bfloat16 activations.

    `pairs` (weights, activations) keeps only those formats.
    """
    seen = set()
    for kernel in KERNELS:
        if kernel.arch == arch and (pairs is None or (kernel.weights, kernel.activations) in pairs):
            for source in _FAMILIES[kernel.module](kernel):
                if source not in seen:
                    seen.add(source)
                    yield source


def _blockscaled_sources(kernel: Kernel) -> Iterator[Source]:
    for gated in (False, True):
        yield quantize_act(kernel.arch, kernel.activations, "bf16", rotate=False, gated=gated)
        if kernel.activations != "nvfp4":
            yield quantize_act(kernel.arch, kernel.activations, "bf16", rotate=True, gated=gated)
    tiles = [blockscaled_tile(kernel, most) for most, _ in BLOCKSCALED_TILES[kernel.arch]]
    for tile in tiles:
        for branch in (False, True):
            yield blockscaled_gemm(kernel, tile, "bf16", branch)


def _hopper_sources(kernel: Kernel) -> Iterator[Source]:
    yield Source(sm90_tiles.activation_text("bf16"), "sm90_activation", kernel.arch)
    for tile in sm90_tiles.TILES:
        for branch in kernel.branches:
            text = sm90_tiles.gemm_text(tile, kernel.weights, branch)
            yield Source(text, "sm90_gemm", kernel.arch)


def _hopper_bf16_sources(kernel: Kernel) -> Iterator[Source]:
    text = sm90_tiles.wide_activation_text("bf16", kernel.activations)
    yield Source(text, "sm90_wide_activation", kernel.arch)
    form = f"{'mxfp8' if kernel.weights == 'mxfp8' else 'fp4'} in bf16"
    for tile in sm90_tiles.TILES:
        for branch in kernel.branches:
            text = sm90_tiles.gemm_text(tile, form, branch)
            yield Source(text, "sm90_gemm", kernel.arch)


_FAMILIES = {
    "sm1xx_blockscaled": _blockscaled_sources,
    "sm90": _hopper_sources,
    "sm90_wide": _hopper_bf16_sources,
}
