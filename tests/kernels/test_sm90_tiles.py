"""Hopper plans: tiles and grids that cover every shape and fit the GPU."""

from __future__ import annotations

from math import ceil

import pytest

from quantkit.kernels import sm90_tiles

SHAPES = [(192, 576), (576, 1536), (6144, 4096), (4096, 12288), (24576, 4096), (8192, 28672)]
SHAPES += [(57344, 8192)]


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16, 17, 33, 64, 65, 192, 193, 2048, 8192])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sms", [132, 114, 78])
def test_every_shape_has_a_plan_that_covers_it(shape, tokens, sms):
    plan = sm90_tiles.plan(*shape, tokens, sms)
    assert plan.tile in sm90_tiles.TILES
    assert plan.tile.tokens == sm90_tiles.token_tile(tokens)
    assert 1 <= plan.ctas <= sms
    blocks = ceil(shape[0] / 64)
    cluster = plan.tile.cluster
    assert plan.ctas % cluster == 0
    tiles = ceil(blocks / plan.tile.row_groups / cluster) * ceil(tokens / plan.tile.tokens)
    steps = tiles * ceil(shape[1] / (128 * plan.tile.bricks * plan.tile.k_groups))
    if plan.tile.parts > 1:
        assert (plan.ctas, plan.split) == (tiles * plan.tile.parts, False)
    else:
        assert plan.ctas <= (steps if plan.split else tiles) * cluster
    assert not (plan.split and plan.tile.tokens > 64)


def test_tiles_that_divide_are_not_split():
    assert sm90_tiles.plan(24576, 4096, 64) == sm90_tiles.Plan(
        sm90_tiles.Tile(64, 3, 1, 2, 5, 2048), 128, False
    )
    assert sm90_tiles.plan(6144, 4096, 1).ctas == 96
    assert sm90_tiles.plan(8192, 28672, 64).split


@pytest.mark.parametrize("tokens", [1, 16, 32, 64])
def test_few_outputs_are_shared_by_clusters(tokens):
    plan = sm90_tiles.plan(4096, 12288, tokens)
    assert plan.tile.parts > 1
    assert not plan.split
    assert plan.ctas >= 96
    few = sm90_tiles.plan(1024, 4096, tokens)  # clusters would leave most SMs idle
    assert few.tile.parts == 1


def test_a_candidate_runs_on_whole_clusters_and_no_plan_takes_it():
    for tile in sm90_tiles.CANDIDATES:
        assert tile not in sm90_tiles.TILES
        for shape in SHAPES:
            plan = sm90_tiles.plan_of(tile, *shape, tile.tokens)
            assert plan.ctas % (tile.cluster * tile.parts) == 0
            if sm90_tiles.suits(tile, *shape, tile.tokens):
                assert 0 < plan.ctas <= 132
        with sm90_tiles.trying(tile):
            assert sm90_tiles.plan(6144, 4096, tile.tokens).tile == tile
        assert sm90_tiles.plan(6144, 4096, tile.tokens).tile in sm90_tiles.TILES


def test_parts_are_tried_where_their_clusters_fit_at_once():
    tiles = (*sm90_tiles.TILES, *sm90_tiles.CANDIDATES)
    parts = [tile for tile in tiles if tile.parts > 1]
    for tile in parts:
        wanted = [s for s in SHAPES if sm90_tiles.suits(tile, *s, tile.tokens)]
        assert wanted, tile
        for shape in wanted:
            plan = sm90_tiles.plan_of(tile, *shape, tile.tokens)
            assert plan == sm90_tiles.Plan(tile, plan.ctas, False)
            row_tiles = ceil(shape[0] / 64 / tile.row_groups)
            assert 92 < plan.ctas == row_tiles * tile.parts <= 132
        assert sm90_tiles.careful(tile).parts == tile.parts  # which the grid depends on
    four = sm90_tiles.Tile(64, 2, 2, 1, 4, parts=4)  # 32 clusters of four
    assert not sm90_tiles.suits(four, 4096, 12288, 64)
    assert not sm90_tiles.suits(parts[0], 192, 576, 8)


def test_a_tile_is_one_line_and_no_two_are_alike():
    assert len(set(sm90_tiles.TILES)) == len(sm90_tiles.TILES)
    texts = {sm90_tiles.gemm_text(tile, "mxfp4", None) for tile in sm90_tiles.TILES}
    assert len(texts) == len(sm90_tiles.TILES)
    assert all(text.count("\n") == 2 for text in texts)
