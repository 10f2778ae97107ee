"""Which plans are worth running: uniform ones, and the budgets spent site by site or by kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from quantkit.model.sites import ModelLayout
from quantkit.pack.job import Job
from quantkit.plan.allocate import Option, allocate, by_kind
from quantkit.plan.formats import site_bits, site_format, weights_of
from quantkit.plan.sensitivity import Costs

Choice = dict[str, str]  # name of a format by site key

REFERENCES = ("nvfp4", "mxfp4 + bf16 groups of 32")  # uniform plans that are always run
AROUND = (-0.25, 0.5)  # budgets around the one asked for: the curve
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
    units: Mapping[str, Sequence[Option]]

    @staticmethod
    def of(
        layout: ModelLayout, jobs: Mapping[str, Job], names: tuple[str, ...], costs: Costs
    ) -> Market:
        """Bits on disk and expected loss (`costs`, none where nothing was measured)."""
        units = {
            site.key: [
                Option(
                    name,
                    site_bits(site, site_format(jobs, site, name)),
                    costs[site.key].get(name, 0.0),
                )
                for name in names
            ]
            for site in layout.sites
        }
        return Market(layout, names, units)

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
        return Proposal(name, choice, bits, sum(o.loss for o in chosen))

    def by_site(self, budget: float) -> Proposal:
        """The least expected loss within `budget` bits per weight."""
        choice = allocate(self.units, budget * self.weights)
        return self.proposal(f"by site, {budget:.4g} bits", choice)

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
        mixed = [self.by_kind(bits), self.by_site(bits), *map(self.by_site, around)]
        return distinct([*mixed[:2], *uniform, *mixed[2:]])

    def for_limit(self) -> list[Proposal]:
        """Uniform plans, and budgets from the cheapest up."""
        return distinct([*self.uniform(), *(self.by_site(self.least + more) for more in GRID)])

    def between(self, low: float, high: float) -> list[Proposal]:
        """Two budgets between two others."""
        return distinct([self.by_site(low + (high - low) * part) for part in (1 / 3, 2 / 3)])


def distinct(proposals: Sequence[Proposal]) -> list[Proposal]:
    """The first of those that choose alike."""
    found: dict[str, Proposal] = {}
    for proposal in proposals:
        found.setdefault(proposal.digest, proposal)
    return list(found.values())
