"""A decoder block whose linears can be switched, site by site, between ways of computing them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.kernels import reference
from quantkit.model.sites import Linear, ModelLayout, Site
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.experts import QuantExperts

PLAIN = None
"""The mode in which a site computes what the unquantized model computes."""


@dataclass(frozen=True)
class Noise:
    """Mode: add Gaussian noise of `sigma` standard deviations of each channel to the input."""

    sigma: float
    seed: int = 0


@dataclass(frozen=True)
class Rounded:
    """A site as it computes when packed: its input's treatment and one operand per linear."""

    fmt: SiteFormat
    rule: str
    channels: Tensor | None
    weights: Mapping[str, Tensor]  # module name -> operand of kernels/reference.py
    divisor: Tensor | None = None  # of the input (NVFP4)


Rounder = Callable[[Site, Hashable, Mapping[str, Tensor]], Rounded | None]
"""Makes a site's `Rounded` of a mode from its weights by module name; None: it stays plain."""


class SiteSwitch:
    """What one site's linears do at the moment; `mode` is PLAIN, a `Noise`, or a rounded mode."""

    def __init__(self, site: Site, round_site: Rounder, spread: Tensor | None) -> None:
        self.site, self.mode = site, PLAIN  # type: Site, Hashable
        self._round, self._spread = round_site, spread
        self._linears: dict[str, SwitchLinear] = {}
        self._rounded: dict[Hashable, Rounded | None] = {}
        self._last: tuple[Tensor, Hashable, Tensor] | None = None
        self.watch: Callable[[Site, Tensor], None] | None = None
        self.draws = 0

    def adopt(self, linear: SwitchLinear) -> None:
        """Add a linear that reads this site."""
        self._linears[linear.name] = linear

    def weights(self) -> dict[str, Tensor]:
        """The plain weights [out, in] of the site's linears by module name."""
        return {name: linear.weight for name, linear in self._linears.items()}

    def set(self, mode: Hashable) -> None:
        """Compute in `mode` from now on; the noise of a mode starts anew."""
        self.mode, self._last, self.draws = mode, None, 0

    def rounded(self) -> Rounded | None:
        """The site in its present (rounded) mode; made when first needed, then kept."""
        if self.mode not in self._rounded:
            self._rounded[self.mode] = self._round(self.site, self.mode, self.weights())
        return self._rounded[self.mode]

    def forward(self, linear: SwitchLinear, x: Tensor) -> Tensor:
        """Compute one of the site's linears on x [.., in]."""
        if self.watch is not None and linear.first:
            self.watch(self.site, x.reshape(-1, x.shape[-1]))
        if self.mode is PLAIN:
            return functional.linear(x, linear.weight, linear.bias)
        if isinstance(self.mode, Noise):
            noisy = self._shared(x, lambda x: self._noisy(x, self.mode))  # type: ignore[arg-type]
            return functional.linear(noisy, linear.weight, linear.bias)
        rounded = self.rounded()
        if rounded is None:
            return functional.linear(x, linear.weight, linear.bias)

        def operand(x: Tensor) -> Tensor:
            r = rounded
            return reference.input_operand(x, r.fmt, r.rule, r.channels, r.divisor)

        weight = rounded.weights[linear.name]
        return reference.linear(self._shared(x, operand), weight, linear.bias, x.dtype)

    def _shared(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """q, k and v (gate and up) read one tensor: it is treated once."""
        if self._last is None or self._last[0] is not x or self._last[1] != self.mode:
            self._last = (x, self.mode, make(x))
        return self._last[2]

    def _noisy(self, x: Tensor, mode: Noise) -> Tensor:
        assert self._spread is not None, "noise needs the spread of the site's channels"
        name = f"{mode.seed}/{self.site.key}/{self.draws}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.draws += 1
        draw = torch.randn(x.shape, generator=generator).to(x.device)
        return (x.float() + mode.sigma * self._spread.to(x.device) * draw).to(x.dtype)


class SwitchLinear(nn.Module):
    """One linear of a switched site."""

    def __init__(
        self, name: str, weight: Tensor, bias: Tensor | None, switch: SiteSwitch, first: bool
    ) -> None:
        super().__init__()
        self.name, self.weight, self.bias, self.first = name, weight, bias, first
        self.switch = switch
        switch.adopt(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in the site's present mode."""
        return self.switch.forward(self, x)


def install(
    block: nn.Module,
    layout: ModelLayout,
    layer: int,
    round_site: Rounder,
    spreads: Mapping[str, Tensor],
) -> dict[str, SiteSwitch]:
    """Replace the linears of a loaded block by switched ones; the switches by site key.

    Args:
        spreads: standard deviation per channel [width] by site key, for `Noise`.
    """
    switches = {}
    sites = layout.layer_sites(layer)
    mixture = any(site.expert is not None for site in sites)
    for site in sites:
        switch = SiteSwitch(site, round_site, spreads.get(site.key))
        switches[site.key] = switch
        if mixture and site.kind in ("mlp_in", "mlp_out"):
            continue
        for n, linear in enumerate(site.linears):
            parent, _, name = _inside(linear, layer).rpartition(".")
            holder = block.get_submodule(parent)
            old = getattr(holder, name)
            new = SwitchLinear(linear.module, old.weight, old.bias, switch, n == 0)
            setattr(holder, name, new)
    if mixture:
        _install_experts(block, sites, switches)
    return switches


def _inside(linear: Linear, layer: int) -> str:
    return linear.module.removeprefix(f"model.layers.{layer}.")


def _install_experts(
    block: nn.Module, sites: tuple[Site, ...], switches: Mapping[str, SiteSwitch]
) -> None:
    """A loop over switched experts in place of the fused ones; weights are views of theirs."""
    mlp: Any = block.mlp
    fused = mlp.experts
    shared = next(site for site in sites if site.kind == "mlp_in")
    loop = QuantExperts(("gate_proj", "up_proj", "down_proj"), fused.act_fn)
    for site in sites:
        e = site.expert
        if e is None:
            continue
        gate, up = shared.linears[2 * e : 2 * e + 2]
        rows = gate.shape[0]
        parts = fused.gate_up_proj[e]
        switch = switches[shared.key]
        loop.add(
            e,
            SwitchLinear(gate.module, parts[:rows], None, switch, True),
            SwitchLinear(up.module, parts[rows:], None, switch, False),
            SwitchLinear(
                site.linears[0].module, fused.down_proj[e], None, switches[site.key], True
            ),
        )
    mlp.experts = loop
