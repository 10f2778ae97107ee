"""A transformers model's linears replaced by packed ones, as the checkpoint's formats say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.errors import InputRejected
from quantkit.model.families import FAMILIES, describe
from quantkit.model.sites import Linear, Site
from quantkit.pack.scheme import Scheme, SiteFormat
from quantkit.runtime.experts import QuantExperts
from quantkit.runtime.linear import QuantLinear, SharedInput

EXPERTS = "mlp.experts"  # where transformers keeps a block's fused experts


def replace_linears(model: Any, scheme: Scheme, dtype: torch.dtype) -> int:
    """Put a QuantLinear (on the meta device, without numbers) in place of every packed linear.

    `dtype` is that of biases and of weights that stay unrounded. Returns how many were replaced.
    """
    state = {name: tensor for name, tensor in model.state_dict().items()}
    layout = describe(model.config.to_dict(), state)
    replaced = 0
    for layer in range(layout.n_layers):
        sites = layout.layer_sites(layer)
        if any(site.expert is not None for site in sites):
            replaced += _replace_experts(model, layer, sites, scheme, dtype)
        for site in sites:
            fmt = scheme.site(site.key, site.kind)
            linears = [linear for linear in site.linears if linear.expert is None]
            if fmt is None or not linears:
                continue
            shared = SharedInput(len(linears))
            for linear in linears:
                parent, _, name = linear.module.rpartition(".")
                module = _quant_linear(linear, fmt, scheme, dtype, shared)
                setattr(model.get_submodule(parent), name, module)
                replaced += 1
    if not replaced:
        raise InputRejected("the packed checkpoint's configuration matches no linear of the model")
    return replaced


def _quant_linear(
    linear: Linear, fmt: SiteFormat, scheme: Scheme, dtype: torch.dtype, shared: SharedInput
) -> QuantLinear:
    out, width = linear.shape
    return QuantLinear(
        width,
        out,
        fmt,
        scheme.scale_rule,
        bias=linear.bias is not None,
        dtype=dtype,
        site=shared,
        device="meta",
    )


def _replace_experts(
    model: Any, layer: int, sites: tuple[Site, ...], scheme: Scheme, dtype: torch.dtype
) -> int:
    """One module per expert and linear; kinds left out stay ordinary linears beside the others."""
    mlp_in = next(site for site in sites if site.kind == "mlp_in")
    downs = {site.expert: site for site in sites if site.expert is not None}
    formats = [scheme.site(s.key, s.kind) for s in (mlp_in, *downs.values())]
    if not any(formats):
        return 0
    block = model.get_submodule(f"model.layers.{layer}")
    names = FAMILIES[model.config.model_type].experts
    assert names is not None
    experts = QuantExperts((names.gate, names.up, names.down), block.get_submodule(EXPERTS).act_fn)
    replaced = 0

    def build(linear: Linear, fmt: SiteFormat | None, shared: SharedInput) -> nn.Module:
        nonlocal replaced
        if fmt is None:
            out, width = linear.shape
            return nn.Linear(width, out, bias=False, device="meta", dtype=dtype)
        replaced += 1
        return _quant_linear(linear, fmt, scheme, dtype, shared)

    for expert, down in downs.items():
        assert expert is not None
        shared = SharedInput(2)
        gate, up = (
            build(linear, scheme.site(mlp_in.key, "mlp_in"), shared)
            for linear in mlp_in.linears[2 * expert : 2 * expert + 2]
        )
        fmt = scheme.site(down.key, "mlp_out")
        experts.add(expert, gate, up, build(down.linears[0], fmt, SharedInput(1)))
    parent, _, name = EXPERTS.rpartition(".")
    setattr(block.get_submodule(parent), name, experts)
    return replaced
