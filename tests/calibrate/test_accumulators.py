"""Statistics against their definitions in float64, and merging in any order."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

from quantkit.calibrate.accumulators import (
    GROUPS,
    Hits,
    Magnitude,
    Moments,
    SiteAccumulator,
    Tail,
)
from quantkit.errors import InputRejected

TOKENS = 700


def inputs(width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Channels of very different size and mean, with ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, width, generator=generator)
    x *= torch.logspace(-2, 2, width)[torch.randperm(width, generator=generator)]
    x[:, ::7] += 300.0
    x[:, 3] = 0
    x[::2, 5] = x[::2, 6]
    return x.to(dtype)


def measured(x: torch.Tensor, k: int = 20) -> SiteAccumulator:
    accumulator = SiteAccumulator.empty("layers.0.attn_in", x.shape[1], x.dtype, k, room=64)
    accumulator.update(x)
    return accumulator


def test_updates_of_any_size() -> None:
    """A narrow site (an expert) sees few tokens in one batch and many in the next."""
    x = inputs(32, torch.bfloat16)
    accumulator = SiteAccumulator.empty("layers.0.experts.0.mlp_out", 32, x.dtype, 20, room=64)
    for first, last in ((0, 3), (3, 3), (3, 500), (500, TOKENS)):
        accumulator.update(x[first:last])
    state, whole = complete(accumulator), complete(measured(x))
    for name in ("count", "tail", "absmax", "hits32", "qualify32"):
        assert torch.equal(state[name], whole[name]), name


def complete(accumulator: SiteAccumulator, k: int | None = None) -> dict[str, torch.Tensor]:
    threshold = 5 * accumulator.magnitude.mean()
    return accumulator.state_dict(k) | Hits.of(accumulator.maxima, threshold).state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [64, 96, 128, 160, 40])
def test_against_float64(dtype: torch.dtype, width: int) -> None:
    x = inputs(width, dtype)
    state, wide = complete(measured(x)), x.double()
    if dtype == torch.float64:  # magnitudes are kept as float32 numbers
        x = x.float()
    magnitude = x.abs().double()
    mean = wide.mean(0)
    assert int(state["count"]) == TOKENS
    rms = (wide**2).mean(0).sqrt()  # what a mean near zero is the small difference of
    assert bool(((state["mean"] - mean).abs() <= 1e-6 * rms).all())
    for p, name in ((2, "m2"), (3, "m3"), (4, "m4")):
        expected = ((wide - mean) ** p).mean(0)
        scale = ((wide - mean).abs() ** p).mean(0)
        assert bool(((state[name] - expected).abs() <= 2e-6 * scale).all()), name
    torch.testing.assert_close(state["energy"], (wide**2).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["abs_mean"], magnitude.mean(0), rtol=1e-6, atol=0)
    assert torch.equal(state["absmax"].double(), magnitude.amax(0))
    expected_tail = magnitude.sort(dim=0, descending=True).values[:20].T
    assert torch.equal(state["tail"].double(), expected_tail)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 96, 160, 288])
def test_hits_follow_the_definition(dtype: torch.dtype, width: int) -> None:
    """arXiv 2604.12782: argmax of each group and token, counted when it is above the threshold."""
    x = inputs(width, dtype)
    state, magnitude = complete(measured(x)), x.abs()
    threshold = 5 * float(magnitude.double().mean())
    for group in GROUPS:
        hits = torch.zeros(width, dtype=torch.int64)
        qualify = []
        for first in range(0, width, group):
            part = magnitude[:, first : first + group]
            above = part.amax(1).double() > threshold
            qualify.append(int(above.sum()))
            for token in above.nonzero().flatten():
                hits[first + int(part[token].float().argmax())] += 1
        assert torch.equal(state[f"hits{group}"], hits)
        assert state[f"qualify{group}"].tolist() == qualify
        assert int(hits.sum()) > 0


def test_threshold_is_strict() -> None:
    """A value equal to the threshold is no outlier."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 3], x[0, 4:] = 5.0, 1.0
    accumulator = measured(x, k=1)
    for threshold, expected in ((5.0, 0), (4.999, 1), (5.001, 0), (float(x.max()) - 1e-9, 1)):
        assert int(Hits.of(accumulator.maxima, threshold).hits[32].sum()) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_is_associative(dtype: torch.dtype) -> None:
    """Split at random, merge in random order: counts exact, sums to rounding."""
    x = inputs(96, dtype, seed=3)
    whole = complete(measured(x), k=20)
    # Signed sums may be near zero: their rounding is that of the sums without signs.
    sizes = {"mean": (whole["energy"] / TOKENS).sqrt(), "m3": (whole["m2"] * whole["m4"]).sqrt()}
    generator = torch.Generator().manual_seed(11)
    for _ in range(10):
        cuts = torch.randint(0, TOKENS + 1, (5,), generator=generator).sort().values.tolist()
        edges = [0, *cuts, TOKENS]
        parts = [measured(x[a:b]) for a, b in itertools.pairwise(edges)]
        while len(parts) > 1:
            i, j = torch.randperm(len(parts), generator=generator)[:2].tolist()
            joined = parts[i].merge(parts[j])
            parts = [p for n, p in enumerate(parts) if n not in (i, j)] + [joined]
        state = complete(parts[0], k=20)
        assert state.keys() == whole.keys()
        for name, tensor in whole.items():
            if tensor.dtype == torch.int64 or name in ("tail", "absmax"):
                assert torch.equal(state[name], tensor), name
            else:
                size = sizes.get(name, tensor.abs())
                assert bool(((state[name] - tensor).abs() <= 1e-6 * size).all()), name


def test_mean_of_magnitudes_does_not_depend_on_the_order() -> None:
    """The threshold must be one number however the samples were split over processes."""
    generator = torch.Generator().manual_seed(0)
    tiles = [torch.rand(8, 16, generator=generator) * 10 ** (i % 7) for i in range(40)]
    parts = [Magnitude.of(tile) for tile in tiles]
    means = set()
    for _ in range(20):
        order = torch.randperm(len(parts), generator=generator).tolist()
        joined = Magnitude()
        for i in order:
            joined = joined.merge(parts[i])
        means.add(joined.mean())
    assert len(means) == 1


def test_moments_far_from_zero() -> None:
    """A mean a million times the spread: raw moments would cancel, central ones must not."""
    generator = torch.Generator().manual_seed(5)
    x = (2.0**20 + torch.randint(0, 8, (4, 4096), generator=generator)).float()
    joined = Moments()
    for tile in x.split(512, dim=1):
        joined = joined.merge(Moments.of(tile.clone()))
    wide = x.double()
    expected = (wide - wide.mean(1, keepdim=True)).pow(4).mean(1)
    torch.testing.assert_close(joined.state_dict()["m4"], expected, rtol=1e-6, atol=0)


def test_tail_keeps_the_largest_whatever_the_pieces() -> None:
    generator = torch.Generator().manual_seed(2)
    patterns = torch.randint(0, 2**15 - 200, (5, 3000), generator=generator).to(torch.int16)
    expected = patterns.sort(dim=1, descending=True).values[:, :33]
    for room in (1, 40, 5000):
        tail = Tail(33, torch.bfloat16, room)
        for part in patterns.split(77, dim=1):
            tail.update(part)
        again = pickle.loads(pickle.dumps(tail))
        for found in (tail, again, tail.merge(Tail(33, torch.bfloat16))):
            assert torch.equal(found.state_dict()["tail"].view(torch.int16), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_activations_name_their_site(bad: float) -> None:
    x = inputs(64, torch.bfloat16)
    x[100, 17] = bad
    with pytest.raises(InputRejected, match=r"layers\.0\.attn_in"):
        measured(x).state_dict()
