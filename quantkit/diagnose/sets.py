"""Sets of sites to round or to spare, and what a set costs in bits."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from quantkit.model.sites import GENERATORS, KINDS, READERS, ModelLayout
from quantkit.pack.job import Job
from quantkit.pack.layout import stored_bits


@dataclass(frozen=True)
class Set:
    """A named set of sites; `group` is kind, role, or layer."""

    name: str
    group: str
    keys: frozenset[str]


def role_sets(layout: ModelLayout) -> list[Set]:
    """Each site kind, then readers (fed by a norm) and generators (fed by a product)."""
    kinds = [Set(k, "kind", _keys(layout, {k})) for k in KINDS]
    readers = Set("readers", "role", _keys(layout, set(READERS)))
    return [*kinds, readers, Set("generators", "role", _keys(layout, set(GENERATORS)))]


def layer_sets(layout: ModelLayout) -> list[Set]:
    """All sites of each layer."""
    return [
        Set(f"layer {n}", "layer", frozenset(site.key for site in layout.layer_sites(n)))
        for n in range(layout.n_layers)
    ]


def _keys(layout: ModelLayout, kinds: AbstractSet[str]) -> frozenset[str]:
    return frozenset(site.key for site in layout.sites if site.kind in kinds)


def bits_of(layout: ModelLayout, job: Job, left_out: AbstractSet[str] = frozenset()) -> float:
    """True bits per weight of the decoder linears as a job packs them, `left_out` sites spared."""
    bits = weights = 0
    for site in layout.sites:
        fmt = None if site.key in left_out else job.scheme.site(site.key, site.kind)
        for linear in site.linears:
            out, width = linear.shape
            weights += out * width
            bits += stored_bits(fmt, out, width)
    return bits / weights
