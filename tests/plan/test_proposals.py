"""Costs are steadied without losing what all sites of a kind have in common."""

from __future__ import annotations

from math import exp
from random import Random

import pytest

from quantkit.plan.proposals import steadied

KINDS = {f"s{n}": "left" if n % 2 else "right" for n in range(40)}
TRUE = {"left": {"a": 1.0, "b": 0.5}, "right": {"a": 1.0, "b": 0.1}}


def test_sites_that_agree_keep_their_costs() -> None:
    costs = {
        key: {name: (n + 1) * ratio for name, ratio in TRUE[kind].items()}
        for n, (key, kind) in enumerate(KINDS.items())
    }
    found = steadied(costs, KINDS)
    for key, of_site in costs.items():
        assert found[key] == pytest.approx(of_site)


def test_noise_in_ratios_is_halved() -> None:
    random = Random(0)
    costs = {
        key: {name: ratio * exp(random.gauss(0, 0.5)) for name, ratio in TRUE[kind].items()}
        for key, kind in KINDS.items()
    }
    found = steadied(costs, KINDS)

    def spread(of: dict[str, dict[str, float]]) -> float:
        ratios = [of[k]["b"] / of[k]["a"] / TRUE[kind]["b"] for k, kind in KINDS.items()]
        return sum(abs(ratio - 1) for ratio in ratios)

    assert spread(found) < 0.65 * spread(costs)


def test_sites_without_tokens_cost_nothing_and_do_not_count() -> None:
    costs = {"dead": {"a": 0.0, "b": 0.0}, "live": {"a": 1.0, "b": 0.25}}
    found = steadied(costs, {"dead": "left", "live": "left"})
    assert max(found["dead"].values()) < 1e-9
    assert found["live"] == pytest.approx(costs["live"])
