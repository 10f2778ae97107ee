"""A mixture's experts when they are packed: one small module each, named as in the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QuantExperts(nn.Module):
    """Takes the place of the fused experts of a mixture: children "0", "1", ... of three linears.

    `names` are gate, up and down as the checkpoint calls them.
    """

    def __init__(self, names: tuple[str, str, str], act_fn: nn.Module) -> None:
        super().__init__()
        self.names, self.act_fn = names, act_fn

    def add(self, expert: int, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        """Give expert number `expert` its linears."""
        parts = dict(zip(self.names, (gate, up, down), strict=True))
        self.add_module(str(expert), nn.ModuleDict(parts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum each token's chosen experts: hidden [tokens, hidden], choices [tokens, top_k]."""
        gate, up, down = self.names
        final = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if str(expert) not in self._modules:
                continue  # the mark of "no expert" some routers pad with
            slot, token = torch.where((top_k_index == expert).T)
            linears = self.get_submodule(str(expert))
            x = hidden_states[token]
            product = self.act_fn(linears[gate](x)) * linears[up](x)  # type: ignore[index]
            output = linears[down](product) * top_k_weights[token, slot, None]  # type: ignore[index]
            final.index_add_(0, token, output.to(final.dtype))
        return final
