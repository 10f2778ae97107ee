"""Bits go where they save most, and never beyond the budget."""

from __future__ import annotations

from itertools import product
from random import Random

from quantkit.plan.allocate import Option, allocate, by_kind, hull


def random_units(random: Random, units: int = 4, options: int = 4) -> dict[str, list[Option]]:
    return {
        f"u{n}": [
            Option(f"o{i}", random.randint(1, 40), random.random() * 10) for i in range(options)
        ]
        for n in range(units)
    }


def total(units: dict[str, list[Option]], chosen: dict[str, str]) -> tuple[int, float]:
    picked = [next(o for o in units[u] if o.name == name) for u, name in chosen.items()]
    return sum(o.bits for o in picked), sum(o.loss for o in picked)


def test_the_hull_falls_ever_more_slowly() -> None:
    options = [
        Option("a", 1, 10),
        Option("above", 2, 9.5),
        Option("b", 3, 4),
        Option("worse", 4, 6),
        Option("c", 8, 1),
    ]
    assert [o.name for o in hull(options)] == ["a", "b", "c"]


def test_choices_fit_and_are_within_one_step_of_the_best() -> None:
    random = Random(0)
    for _ in range(60):
        units = random_units(random)
        least = sum(min(o.bits for o in options) for options in units.values())
        budget = least + random.randint(0, 60)
        bits, loss = total(units, allocate(units, budget))
        assert bits <= budget
        best = min(
            sum(o.loss for o in picked)
            for picked in product(*units.values())
            if sum(o.bits for o in picked) <= budget
        )
        step = max(hull(options)[0].loss - hull(options)[-1].loss for options in units.values())
        assert best - 1e-9 <= loss <= best + step


def test_a_budget_on_the_hull_is_spent_optimally() -> None:
    units = {
        "a": [Option("4", 4, 8.0), Option("8", 8, 1.0)],
        "b": [Option("4", 4, 3.0), Option("8", 8, 2.5)],
    }
    assert allocate(units, 8) == {"a": "4", "b": "4"}
    assert allocate(units, 12) == {"a": "8", "b": "4"}
    assert allocate(units, 16) == {"a": "8", "b": "8"}


def test_kinds_add_up_and_lose_what_not_all_members_have() -> None:
    units = {
        "x": [Option("4", 4, 1.0), Option("8", 8, 0.5)],
        "y": [Option("4", 6, 2.0)],
        "z": [Option("4", 1, 3.0), Option("8", 2, 0.0)],
    }
    kinds = by_kind(units, {"x": "left", "y": "left", "z": "right"})
    assert kinds == {
        "left": [Option("4", 10, 3.0)],
        "right": [Option("4", 1, 3.0), Option("8", 2, 0.0)],
    }
