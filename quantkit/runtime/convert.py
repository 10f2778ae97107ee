"""A transformers model's linears replaced by packed ones, as the checkpoint's formats say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.errors import InputRejected
from quantkit.model.families import FAMILIES, describe
from quantkit.model.sites import Linear, Site
from quantkit.pack.scheme import Scheme
from quantkit.runtime import mlp, norm
from quantkit.runtime.embedding import replace_ends
from quantkit.runtime.experts import QuantExperts
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.site import PackedSite

EXPERTS = "mlp.experts"  # where transformers keeps a block's fused experts


def replace_linears(model: Any, scheme: Scheme, dtype: torch.dtype) -> int:
    """Put a QuantLinear (on the meta device, without numbers) in place of every packed linear.

    So it does with a packed embedding. `dtype` is that of biases and of weights that stay
    unrounded. Returns how many linears of blocks were replaced.
    """
    layout = describe(model.config.to_dict(), model.state_dict())
    replaced = 0
    for layer in range(layout.n_layers):
        sites = layout.layer_sites(layer)
        if any(site.expert is not None for site in sites):
            replaced += _replace_experts(model, layer, sites, scheme, dtype)
        for site in sites:
            shared = _packed_site(scheme, site, site.key)
            if shared is None:
                continue
            for linear in (x for x in site.linears if x.expert is None):
                parent, _, name = linear.module.rpartition(".")
                module = _quant_linear(linear, dtype, shared)
                setattr(model.get_submodule(parent), name, module)
                replaced += 1
        block = model.get_submodule(f"model.layers.{layer}")
        mlp.fuse(block)
        norm.fuse(block)
    replace_ends(model, scheme.head, scheme.embedding, scheme.scale_rule, dtype)
    if not replaced:
        raise InputRejected("the packed checkpoint's configuration matches no linear of the model")
    return replaced


def name_in_memory(model_type: str, module: str) -> str:
    """What transformers calls a module that the checkpoint calls `module`."""
    experts = FAMILIES[model_type].experts
    return module if experts is None else module.replace(f".{experts.module}.", f".{EXPERTS}.")


def _quant_linear(linear: Linear, dtype: torch.dtype, site: PackedSite) -> QuantLinear:
    out, width = linear.shape
    bias = linear.bias is not None
    return QuantLinear(width, out, site.format, bias=bias, dtype=dtype, site=site, device="meta")


def _replace_experts(
    model: Any, layer: int, sites: tuple[Site, ...], scheme: Scheme, dtype: torch.dtype
) -> int:
    """One module per expert and linear; kinds left out stay ordinary linears beside the others."""
    mlp_in = next(site for site in sites if site.kind == "mlp_in")
    downs = {site.expert: site for site in sites if site.expert is not None}
    if not any(scheme.site(s.key, s.kind) for s in (mlp_in, *downs.values())):
        return 0
    block = model.get_submodule(f"model.layers.{layer}")
    names = FAMILIES[model.config.model_type].experts
    assert names is not None
    experts = QuantExperts((names.gate, names.up, names.down), block.get_submodule(EXPERTS).act_fn)
    replaced = 0

    def build(linear: Linear, site: PackedSite | None) -> nn.Module:
        nonlocal replaced
        if site is None:
            out, width = linear.shape
            return nn.Linear(width, out, bias=False, device="meta", dtype=dtype)
        replaced += 1
        return _quant_linear(linear, dtype, site)

    for expert, down in downs.items():
        assert expert is not None
        shared = _packed_site(scheme, mlp_in, f"layers.{layer}.experts.{expert}.mlp_in")
        gate, up = (build(x, shared) for x in mlp_in.linears[2 * expert : 2 * expert + 2])
        experts.add(expert, gate, up, build(down.linears[0], _packed_site(scheme, down, down.key)))
    parent, _, name = EXPERTS.rpartition(".")
    setattr(block.get_submodule(parent), name, experts)
    return replaced


def _packed_site(scheme: Scheme, site: Site, key: str) -> PackedSite | None:
    fmt = scheme.site(site.key, site.kind)
    return None if fmt is None else PackedSite(key, fmt, scheme.scale_rule)
