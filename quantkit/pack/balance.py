"""Balance channels while packing: exact diagonal scales that even out input and weight energies.

With input energies e and weight energies v, a block loses about (sum e/s^2)(sum v s^2) to 4-bit
noise on both sides; s = (e / v)^(1/4) is the least it can be (Cauchy and Schwarz). SmoothQuant
(2211.10438) has maxima in the place of energies, which suits tensors with one scale; here blocks
have their own and a Hadamard spreads what is inside them. The scales are folded in float64 into
weights that are rounded only once, to 4 bits; gains are rounded first and the scale follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.sites import Site
from quantkit.outliers.choose import weight_energy
from quantkit.transforms import fold

if TYPE_CHECKING:
    from quantkit.calibrate.store import Statistics

LIMIT = 50.0  # no scale is further from the geometric mean than this factor


class EditedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with edits applied (float32), the files left alone."""

    def __init__(self, source: Checkpoint, edits: fold.Edits) -> None:
        self.__dict__.update(source.__dict__)
        self.source, self.edits = source, edits

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Read a tensor, edited."""
        edits = self.edits.get(name)
        if not edits:
            return self.source.read(name, out)
        tensor = fold.edited(self.source.read(name), edits, torch.float32)
        return tensor if out is None else out.copy_(tensor)

    def read_rows(self, name: str, part: int | slice) -> Tensor:
        """Read a part of a tensor along its first dimension, edited."""
        edits = self.edits.get(name)
        if not edits:
            return self.source.read_rows(name, part)
        if isinstance(part, int) and len(self.source.tensors[name].shape) == 3:
            mine = [replace(e, expert=None) for e in edits if e.expert == part]
            tensor = self.source.read_rows(name, part)
            return fold.edited(tensor, mine, torch.float32) if mine else tensor.float()
        return self.read(name)[part]


def balanced(
    source: Checkpoint, sites: Sequence[Site], statistics: Statistics
) -> tuple[EditedCheckpoint, dict[str, Tensor]]:
    """The checkpoint with every site's channels balanced, and the scales: inputs become x / s.

    Needs the statistics' `energy`; a site without tokens is left alone.
    """
    edits: fold.Edits = {}
    scales: dict[str, Tensor] = {}
    for site in sites:
        if not statistics.has(site.key):
            continue
        energy = statistics.get(site.key, "energy").double()
        scale = balance_scale(site, energy, weight_energy(source, site))
        if site.norm is not None:
            scale = _representable(source, site, scale)
        scales[site.key] = scale
        fold.add(edits, fold.scale(site, scale))
    return EditedCheckpoint(source, edits), scales


def balance_scale(site: Site, energy: Tensor, weights: Tensor) -> Tensor:
    """s = (energy / weights)^(1/4), geometric mean 1: float64 [width].

    Heads that read one KV head share a scale: their energies are added first. Channels that are
    dead on either side get 1.
    """
    if site.groups > 1:
        rows = site.writer_rows()
        energy, weights = _added(energy, rows), _added(weights, rows)
    live = (energy > 0) & (weights > 0)
    log_s = 0.25 * (energy.clamp_min(1e-300).log() - weights.clamp_min(1e-300).log())
    log_s = torch.where(live, log_s, torch.nan)
    bound = torch.tensor(LIMIT, dtype=torch.float64).log()
    return (log_s - log_s.nanmean()).nan_to_num(0.0).clamp(-bound, bound).exp()


def _added(values: Tensor, rows: Tensor) -> Tensor:
    return values.new_zeros(int(rows.max()) + 1).index_add_(0, rows, values)[rows]


def _representable(source: Checkpoint, site: Site, scale: Tensor) -> Tensor:
    """The scale that the gain, rounded to the type it is stored in, really divides by."""
    assert site.norm is not None
    stored = source.read(site.norm)
    gain = stored.double() + site.norm_offset
    rounded = (gain / scale - site.norm_offset).to(stored.dtype).double() + site.norm_offset
    exact = gain / rounded
    return torch.where((exact > 0) & torch.isfinite(exact), exact, scale)
