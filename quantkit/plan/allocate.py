"""Spend a budget of bits where a bit saves most.

Every unit (a site, or all sites of a kind) chooses one of several (bits, loss) pairs; the sum of
losses is to be least for a sum of bits. Only pairs on the lower convex hull of a unit can be best
for some price of a bit; walking down all hulls at once by falling gain per bit is optimal but for
the last step, whose remainder is offered to the steps that still fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What a unit can choose: its name, its bits, and what it is expected to lose."""

    name: str
    bits: int
    loss: float


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, by rising bits and falling loss."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.loss)):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], option):
            kept.pop()
        kept.append(option)
    return kept


def _gain(before: Option, after: Option) -> float:
    return (before.loss - after.loss) / (after.bits - before.bits)


def allocate(units: Mapping[str, Sequence[Option]], bits: float) -> dict[str, str]:
    """Choose for each unit; the bits of all choices together stay within `bits`.

    Where even the cheapest choices exceed it, those are given.
    """
    hulls = {unit: hull(options) for unit, options in units.items()}
    at = dict.fromkeys(hulls, 0)
    left = bits - sum(options[0].bits for options in hulls.values())
    steps = [
        (-_gain(options[0], options[1]), unit) for unit, options in hulls.items() if options[1:]
    ]
    heapq.heapify(steps)
    while steps:
        _, unit = heapq.heappop(steps)
        options, place = hulls[unit], at[unit]
        price = options[place + 1].bits - options[place].bits
        if price > left:
            continue  # this unit stays; smaller steps of others may still fit
        left -= price
        at[unit] = place + 1
        if place + 2 < len(options):
            heapq.heappush(steps, (-_gain(options[place + 1], options[place + 2]), unit))
    return {unit: options[at[unit]].name for unit, options in hulls.items()}


def by_kind(
    units: Mapping[str, Sequence[Option]], kinds: Mapping[str, str]
) -> dict[str, list[Option]]:
    """One unit for all sites of a kind (`kinds`: kind by site), choosing what all of them can."""
    found: dict[str, dict[str, tuple[int, float, int]]] = {}
    for key, options in units.items():
        sums = found.setdefault(kinds[key], {})
        for option in options:
            bits, loss, count = sums.get(option.name, (0, 0.0, 0))
            sums[option.name] = bits + option.bits, loss + option.loss, count + 1
    members = {kind: sum(k == kind for k in kinds.values()) for kind in found}
    return {
        kind: [Option(n, bits, loss) for n, (bits, loss, c) in sums.items() if c == members[kind]]
        for kind, sums in found.items()
    }
