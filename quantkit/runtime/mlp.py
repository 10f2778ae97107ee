"""A packed gated MLP: SwiGLU inside the down projection's activation kernel, where it has that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quantkit.runtime.linear import QuantLinear

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class PackedMlp(nn.Module):
    """Takes the place of a block's MLP with its children, named as they were.

    `down(act(gate(x)) * up(x))`. When one kernel gives gate and up side by side and the next takes
    them so (`gated`), the product never goes to memory.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., hidden] -> [.., hidden]."""
        gate, up, down = (self.get_submodule(n) for n in ("gate_proj", "up_proj", "down_proj"))
        assert isinstance(gate, QuantLinear)
        assert isinstance(down, QuantLinear)
        second: Any = down.site.kernel(x)
        if gate.site.kernel(x) is not None and hasattr(second, "gated"):
            y = second.gated(gate.site.joined(x))
            return y.reshape(*x.shape[:-1], down.out_features)
        return down(self.get_submodule("act_fn")(gate(x)) * up(x))


def _is_silu(activation: object) -> bool:
    from transformers.activations import ACT2FN  # has a class of its own since version 5

    return isinstance(activation, (nn.SiLU, type(ACT2FN["silu"])))


def fuse(block: nn.Module, name: str = "mlp") -> None:
    """Replace the MLP of a decoder block by a PackedMlp if it is one of gate, up, SiLU and down."""
    mlp = getattr(block, name, None)
    if not isinstance(mlp, nn.Module) or {n for n, _ in mlp.named_children()} != PARTS:
        return
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if (
        isinstance(gate, QuantLinear)
        and isinstance(down, QuantLinear)
        and gate.site.members == [gate, up]
        and down.site.members == [down]
        and _is_silu(mlp.act_fn)
    ):
        setattr(block, name, PackedMlp(mlp))
