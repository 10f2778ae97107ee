"""Which plans are worth running: uniform ones, and the budgets spent site by site or by kind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import exp, log
from statistics import mean

from quantkit.model.sites import ModelLayout
from quantkit.pack.job import Job
from quantkit.plan.allocate import Option, allocate, by_kind
from quantkit.plan.formats import number_format, site_bits, site_format, weights_of
from quantkit.plan.sensitivity import Costs

Choice = dict[str, str]  # name of a format by site key

REFERENCES = ("nvfp4", "mxfp4 + bf16 groups of 32")  # uniform plans that are always run
AROUND = (-0.25, 0.5)  # budgets around the one asked for: the curve
TINY = 1e-12  # nats: what a site costs at least, where its logarithm is taken
GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5)  # bits above the cheapest: where a limit is looked for


@dataclass(frozen=True)
class Proposal:
    """A plan to be run: its name, format by site, bits per weight and expected loss."""

    name: str
    choice: Choice
    bits: float
    expected: float

    @property
    def digest(self) -> str:
        """What identifies the choice."""
        return sha256(json.dumps(self.choice, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Market:
    """What every site of a model can choose, at which price."""

    layout: ModelLayout
    names: tuple[str, ...]
    costs: Costs  # as measured
    units: Mapping[str, Sequence[Option]]  # as bits are spent: see `steadied`

    @staticmethod
    def of(
        layout: ModelLayout, jobs: Mapping[str, Job], names: tuple[str, ...], costs: Costs
    ) -> Market:
        """Bits on disk and expected loss (`costs`, none where nothing was measured)."""
        steady = steadied(costs, {site.key: site.kind for site in layout.sites})
        units = {
            site.key: [
                Option(
                    name,
                    site_bits(site, site_format(jobs, site, name)),
                    steady[site.key].get(name, 0.0),
                )
                for name in names
            ]
            for site in layout.sites
        }
        return Market(layout, names, costs, units)

    @property
    def weights(self) -> int:
        """Weights of all sites together."""
        return weights_of(self.layout)

    @property
    def least(self) -> float:
        """Bits per weight of the cheapest plan there is."""
        cheapest = (min(o.bits for o in options) for options in self.units.values())
        return sum(cheapest) / self.weights

    def proposal(self, name: str, choice: Choice) -> Proposal:
        """A choice with its bits and expected loss."""
        chosen = [
            next(o for o in self.units[key] if o.name == wanted) for key, wanted in choice.items()
        ]
        bits = sum(o.bits for o in chosen) / self.weights
        expected = sum(self.costs[key].get(wanted, 0.0) for key, wanted in choice.items())
        return Proposal(name, choice, bits, expected)

    def by_site(self, budget: float, number: str | None = None) -> Proposal:
        """The least expected loss within `budget` bits per weight.

        With a `number` format only the branches differ from site to site.
        """
        units = {
            key: [o for o in options if number is None or number_format(o.name) == number]
            for key, options in self.units.items()
        }
        choice = allocate(units, budget * self.weights)
        words = f"by site, {budget:.4g} bits"
        return self.proposal(words if number is None else f"{words}, {number} only", choice)

    def one_number(self, budget: float) -> list[Proposal]:
        """By site within each number format that has several candidates and fits."""
        numbers = Counter(map(number_format, self.names))
        found = [self.by_site(budget, n) for n, count in numbers.items() if count > 1]
        return [proposal for proposal in found if proposal.bits <= budget]

    def by_kind(self, budget: float) -> Proposal:
        """The same with one format for all sites of a kind."""
        kinds = {site.key: site.kind for site in self.layout.sites}
        shared = allocate(by_kind(self.units, kinds), budget * self.weights)
        choice = {key: shared[kind] for key, kind in kinds.items()}
        return self.proposal(f"by kind, {budget:.4g} bits", choice)

    def uniform(self) -> list[Proposal]:
        """One format everywhere: those no other is expected to beat, and the references."""
        every = [self.proposal(f"all {n}", dict.fromkeys(self.units, n)) for n in self.names]
        return [
            p
            for p in every
            if p.name.removeprefix("all ") in REFERENCES
            or not any(o.bits <= p.bits and o.expected < p.expected for o in every)
        ]

    def for_bits(self, bits: float) -> list[Proposal]:
        """Uniform plans, those for the budget, and some at other budgets for the curve."""
        uniform = [p for p in self.uniform() if p.bits <= bits + max(AROUND)]
        around = [bits + more for more in AROUND if bits + more >= self.least]
        asked = [self.by_kind(bits), self.by_site(bits), *self.one_number(bits)]
        return distinct([*uniform, *asked, *map(self.by_site, around)])

    def for_limit(self) -> list[Proposal]:
        """Uniform plans, and budgets from the cheapest up."""
        return distinct([*self.uniform(), *(self.by_site(self.least + more) for more in GRID)])

    def between(self, low: float, high: float) -> list[Proposal]:
        """Two budgets between two others."""
        return distinct([self.by_site(low + (high - low) * part) for part in (1 / 3, 2 / 3)])


def steadied(costs: Costs, kinds: Mapping[str, str]) -> Costs:
    """Costs whose ratios between formats are drawn half-way to those usual for the kind of site.

    The few tokens that dominate a site's cost make its ratios noisy, and spending bits by the
    smallest of many noisy numbers would pick the errors.
    """
    logs = {
        key: {name: log(max(cost, TINY)) for name, cost in found.items()}
        for key, found in costs.items()
    }
    levels = {key: mean(found.values()) for key, found in logs.items()}
    usual: dict[tuple[str, str], list[float]] = {}
    for key, found in logs.items():
        for name, value in found.items() if max(costs[key].values()) > TINY else ():
            usual.setdefault((kinds[key], name), []).append(value - levels[key])
    return {
        key: {
            name: exp((value + levels[key] + mean(usual.get((kinds[key], name), [0.0]))) / 2)
            for name, value in found.items()
        }
        for key, found in logs.items()
    }


def distinct(proposals: Sequence[Proposal]) -> list[Proposal]:
    """The first of those that choose alike."""
    found: dict[str, Proposal] = {}
    for proposal in proposals:
        found.setdefault(proposal.digest, proposal)
    return list(found.values())
