"""The inputs of every site in the plain model, and the error that rounding makes in each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.accumulators import Hits, Scratch, SiteAccumulator
from quantkit.diagnose.switches import PLAIN, SiteSwitch
from quantkit.model.block import BlockRunner
from quantkit.model.sites import READERS, Site

ALPHA = 5.0  # an outlier exceeds 5 mean|x| (OSC, section 3)
BLOCK = 32  # of the block formats
RASTER_CHANNELS, RASTER_TOKENS = 16, 160


@dataclass(frozen=True)
class SiteView:
    """One site's inputs over all tokens seen.

    `kurtosis`: the largest excess kurtosis of a channel over tokens, E[(x-mu)^4]/sigma^4 - 3.
    `severity`: channel absmax, the largest over the median channel's.
    `crest`: amax / RMS of blocks of 32 channels, mean over blocks and tokens.
    `density`: clustering density for groups of 32 (None: no token above the threshold).
    `bound_use`: for readers, the largest ||x|| over sqrt(width) max|gain|, which RMSNorm bounds
    by 1; None elsewhere.
    `raster`: (channel, levels) of the channels most often above the threshold; a level is a digit
    per token, 2 log2(|x| / mean|x|) cut to 0..9, so that 5 and more is an outlier.
    """

    key: str
    layer: int
    kind: str
    tokens: int
    kurtosis: float
    severity: float
    crest: float
    density: float | None
    absmax: float
    rms: float
    bound_use: float | None
    raster: tuple[tuple[int, str], ...] = ()

    def as_dict(self, raster: bool) -> dict[str, Any]:
        """For JSON; the raster only where it is drawn."""
        found = dict(self.__dict__)
        if not raster:
            del found["raster"]
        return found


@dataclass
class Observations:
    """Views by site key, spread of every channel, and the error rounding makes in each block."""

    views: dict[str, SiteView] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(default_factory=dict)  # standard deviation [width]
    # mode -> layer -> ||block_q(h) - block(h)|| / ||block(h) - h||, h from the plain model
    local_error: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Growing:
    accumulator: SiteAccumulator
    crest: float = 0.0
    tokens: int = 0
    largest_norm: float = 0.0
    first: Tensor | None = None


class Observer:
    """Looks at every layer during a sweep: see `sweep.Observer`.

    Args:
        modes: rounded modes whose error in each block is wanted.
        windows: batches of plain hidden states to compute those errors on (all for the views).
    """

    def __init__(self, runner: BlockRunner, modes: Sequence[str], windows: int = 4) -> None:
        self.runner, self.modes, self.windows = runner, modes, windows
        self.found = Observations(local_error={mode: [] for mode in modes})
        self._scratch = Scratch()

    def __call__(
        self, layer: int, switches: Mapping[str, SiteSwitch], block: Any, plain: Sequence[Tensor]
    ) -> None:
        growing: dict[str, _Growing] = {}

        def watch(site: Site, x: Tensor) -> None:
            self._take(growing, site, x)

        for switch in switches.values():
            switch.set(PLAIN)
            switch.watch = watch
        exact = [self.runner.forward(block, hidden) for hidden in plain]
        for switch in switches.values():
            switch.watch = None
        for key, site in growing.items():
            self._settle(switches[key].site, site)
        some = list(zip(plain, exact, strict=True))[: self.windows]
        update = sum(float((e.float() - h.float()).square().sum()) for h, e in some)
        for mode in self.modes:
            for switch in switches.values():
                switch.set(mode)
            wrong = sum(
                float((self.runner.forward(block, h).float() - e.float()).square().sum())
                for h, e in some
            )
            self.found.local_error[mode].append((wrong / update) ** 0.5 if update else 0.0)

    def _take(self, growing: dict[str, _Growing], site: Site, x: Tensor) -> None:
        if site.key not in growing:
            empty = SiteAccumulator.empty(site.key, site.width, x.dtype, 1)
            growing[site.key] = _Growing(empty, first=x[:RASTER_TOKENS].float().cpu())
        state = growing[site.key]
        state.accumulator.update(x, self._scratch)
        width = site.width // BLOCK * BLOCK
        blocks = x[:, :width].float().unflatten(-1, (-1, BLOCK))
        rms = blocks.square().mean(-1).sqrt().clamp(min=1e-30)
        state.crest += float((blocks.abs().amax(-1) / rms).mean(-1).sum())
        state.tokens += len(x)
        state.largest_norm = max(state.largest_norm, float(x.float().norm(dim=-1).amax()))

    def _settle(self, site: Site, state: _Growing) -> None:
        accumulator, tokens = state.accumulator, state.tokens
        statistics = accumulator.state_dict()
        mean = accumulator.magnitude.mean()
        hits = Hits.of(accumulator.maxima, ALPHA * mean)
        m2, m4 = statistics["m2"], statistics["m4"]
        kurtosis = torch.where(m2 > 0, m4 / m2.clamp(min=1e-300) ** 2 - 3, torch.zeros_like(m2))
        absmax = statistics["absmax"].double()
        modal = torch.nn.functional.pad(hits.hits[32], (0, -site.width % 32)).view(-1, 32).amax(1)
        live = hits.qualify[32] > 0
        density = (modal[live].double() / hits.qualify[32][live].double()).mean()
        self.found.spreads[site.key] = m2.sqrt().float()
        self.found.views[site.key] = SiteView(
            key=site.key,
            layer=site.layer,
            kind=site.kind,
            tokens=tokens,
            kurtosis=float(kurtosis.max()),
            severity=float(absmax.max() / absmax.median().clamp(min=1e-30)),
            crest=state.crest / tokens,
            density=float(density) if bool(live.any()) else None,
            absmax=float(absmax.max()),
            rms=float((statistics["energy"].sum() / tokens / site.width).sqrt()),
            bound_use=self._bound_use(site, state.largest_norm),
            raster=_raster(state.first, hits.hits[32], statistics["abs_mean"], mean),
        )

    def _bound_use(self, site: Site, largest_norm: float) -> float | None:
        """RMSNorm with gain g: ||x|| <= sqrt(width) max|g|, whatever the residual holds."""
        if site.kind not in READERS or site.norm is None:
            return None
        gain = self.runner.checkpoint.read(site.norm).float() + site.norm_offset
        return largest_norm / (site.width**0.5 * float(gain.abs().max()))


def _raster(
    x: Tensor | None, hits: Tensor, magnitude: Tensor, mean: float
) -> tuple[tuple[int, str], ...]:
    if x is None or not mean:
        return ()
    # most hits first; where nothing is above the threshold, the largest on average
    order = hits.double() + magnitude.double() / (magnitude.max().double() + 1e-30) * 0.5
    channels = order.topk(min(RASTER_CHANNELS, len(order))).indices.sort().values.tolist()
    levels = (2 * torch.log2((x.abs() / mean).clamp(min=1e-9))).round().clamp(0, 9).int()
    return tuple((c, "".join(map(str, levels[:, c].tolist()))) for c in channels)
