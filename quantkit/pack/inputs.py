"""What calibration knows about the inputs, used by packing: energies, balance, free channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit import console
from quantkit.calibrate.store import Statistics, load_statistics
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats import FORMATS
from quantkit.model.sites import ModelLayout, Site
from quantkit.outliers.budget import branch_columns, choose_free, choose_lossy, evened
from quantkit.outliers.choose import weight_energy
from quantkit.outliers.plan import Plan
from quantkit.pack.balance import balanced
from quantkit.pack.layout import alignment, check_width
from quantkit.pack.scheme import SiteFormat

if TYPE_CHECKING:
    from quantkit.pack.job import PackOptions


@dataclass(frozen=True)
class Inputs:
    """The statistics, the weights they meet, and both after balancing (scales by site key)."""

    statistics: Statistics
    weights: Checkpoint
    scales: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]  # mean square by channel, float64; only sites that saw tokens

    @staticmethod
    def load(source: Checkpoint, layout: ModelLayout, options: PackOptions) -> Inputs:
        """Read the statistics, balance if asked to. Raises InputRejected without statistics."""
        statistics = load_statistics(source)
        weights: Checkpoint = source
        scales: dict[str, Tensor] = {}
        if options.balance:
            weights, scales = balanced(source, layout.sites, statistics)
        energies = {}
        for site in layout.sites:
            if statistics.has(site.key):
                energy = statistics.get(site.key, "energy").double()
                energy /= int(statistics.get(site.key, "count"))
                if site.key in scales:
                    energy /= scales[site.key] ** 2
                energies[site.key] = energy
        return Inputs(statistics, weights, scales, energies)

    def plan(
        self,
        sites: Sequence[Site],
        formats: Mapping[str, SiteFormat | None],
        options: PackOptions,
    ) -> Plan:
        """Spend `branch_bits` on each site's best channels by the criterion."""
        assert options.branch_bits is not None
        assert options.criterion is not None
        chosen: dict[str, tuple[int, ...]] = {}
        for site in sites:
            fmt = formats[site.key]
            if fmt is None:
                chosen[site.key] = ()
                continue
            check_width(fmt, site.width, site.key)
            count = branch_columns(
                site.width, options.branch_bits, _bits(fmt, options), alignment(fmt)
            )
            alike = torch.ones(site.width, dtype=torch.float64)  # an expert that saw few tokens
            energy = self.energies.get(site.key, alike)
            weights = weight_energy(self.weights, site)
            if fmt.branch == "residual":
                energy, weights = (evened(e, fmt.hadamard_size) for e in (energy, weights))
                found = choose_lossy(energy, weights, count, options.criterion, fmt.activations)
            else:
                block = options.hadamard or FORMATS[fmt.activations].block
                found = choose_free(energy, weights, count, options.criterion, block)
            chosen[site.key] = tuple(found.tolist())
        console.note(f"separating {options.branch_bits} bits per weight by {options.criterion}")
        digest = self.statistics.meta["weights_digest"]
        return Plan(chosen, 0, options.criterion, digest, self.statistics.digest)


def _bits(fmt: SiteFormat, options: PackOptions) -> float:
    """What a column of a site's branch costs by weight."""
    if fmt.branch == "residual":
        return FORMATS[fmt.weights].bits or 4.5
    branch = options.branch if fmt.weights == "none" else fmt.branch
    return 8 if branch == "fp8" else 16
