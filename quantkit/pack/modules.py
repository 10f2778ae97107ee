"""A decoder block while it is packed: its linears replaced by packed ones as they get done."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantkit.kernels import reference
from quantkit.model.block import BlockRunner
from quantkit.model.sites import Linear
from quantkit.pack.layout import channels_of
from quantkit.pack.scheme import SiteFormat


class SharedInput:
    """The linears of a site quantize their input once: the last one's operand is remembered.

    `replay` is the operand [tokens, n] of a batch that was seen before; it is taken for every x of
    as many tokens, whatever x is (depth registers go through the same linears, fewer at a time).
    """

    def __init__(self, fmt: SiteFormat, rule: str) -> None:
        self.format, self.rule = fmt, rule
        self.replay: Tensor | None = None
        self._x: Tensor | None = None
        self._operand: Tensor | None = None

    def operand(self, x: Tensor, channels: Tensor | None, divisor: Tensor | None) -> Tensor:
        """The operand of x as the runtime makes it."""
        if self.replay is not None and len(self.replay) == x.shape[:-1].numel():
            return self.replay.view(*x.shape[:-1], -1)
        if self._x is not x or self._operand is None:
            self._x = x
            self._operand = reference.input_operand(x, self.format, self.rule, channels, divisor)
        return self._operand


class PackedReference(nn.Module):
    """A packed linear in the runtime's reference arithmetic, from its tensors alone."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shared: SharedInput,
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.shared, self.bias = shared, bias
        self.weight = reference.weight_operand(tensors, shared.format, dtype)
        self.channels = channels_of(tensors)
        self.divisor = tensors.get("input_global_scale")

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        operand = self.shared.operand(x, self.channels, self.divisor)
        return reference.linear(operand, self.weight, self.bias, x.dtype)


class AttentionReplay(nn.Module):
    """Attention whose output projection gets the operands it got before: nothing else is computed.

    The parts stay in their places, so that hooks find them; none of theirs is called.
    """

    def __init__(self, attention: nn.Module, projection: PackedReference) -> None:
        super().__init__()
        for name, part in attention.named_children():
            self.add_module(name, part)
        self.layer_idx = attention.layer_idx
        self._projection = [projection]  # in a list: not a part twice

    def forward(self, hidden_states: Tensor, **arguments: object) -> tuple[Tensor, None]:
        """hidden_states only says how many tokens there are."""
        return self._projection[0].forward(hidden_states), None


class PackedBlock:
    """Block `layer` of a runner; `install` puts a packed linear in the place of an ordinary one.

    Experts live in a fused parameter: theirs get the packed weight in the coordinates of the
    unpacked one (their inputs stay unquantized while the block is packed).
    """

    def __init__(self, runner: BlockRunner, layer: int) -> None:
        self.runner, self.layer = runner, layer
        self.module = runner.load(layer)
        self._modules: dict[str, nn.Module] = {}
        self._weights: dict[str, Tensor] = {}
        self._stale = False
        self._attention: nn.Module | None = None  # while it is replayed

    def install(self, linear: Linear, tensors: Mapping[str, Tensor], shared: SharedInput) -> None:
        """Let the block compute `linear` from its packed tensors."""
        if ".experts." in linear.module:
            weight = unpacked_weight(tensors, shared.format)
            self._weights[f"{linear.module}.weight"] = weight.to(self.runner.dtype).cpu()
            self._stale = True
            return
        bias = self.bias(linear)
        self.put(linear, PackedReference(tensors, shared, self.runner.dtype, bias))

    def put(self, linear: Linear, module: nn.Module) -> None:
        """Let the block compute `linear` by a module of its own."""
        self._modules[linear.module] = module
        self._place(linear.module, module)

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias of a linear, whatever computes it by now."""
        found = self.module.get_submodule(linear.module.split(".", 3)[3]).bias
        return found if isinstance(found, Tensor) else None

    def replay_attention(self, projection: Linear) -> None:
        """Compute no attention any more: its output projection, packed, replays its operands."""
        packed = self._modules[projection.module]
        attention = self.module.self_attn
        assert isinstance(packed, PackedReference)
        assert isinstance(attention, nn.Module)
        self._attention = attention
        self.module.self_attn = AttentionReplay(attention, packed)

    def restore_attention(self) -> None:
        """Compute attention again."""
        if self._attention is not None:
            self.module.self_attn, self._attention = self._attention, None

    def settle(self) -> None:
        """Make installed experts take effect."""
        if self._stale:
            self.module, self._attention = self.runner.load(self.layer, self._weights), None
            for name, module in self._modules.items():
                self._place(name, module)
            self._stale = False

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.split(".", 3)[3].rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, module)


def unpacked_weight(tensors: Mapping[str, Tensor], fmt: SiteFormat) -> Tensor:
    """A packed linear's weight in the coordinates it was packed from: float32 [out, in].

    What it multiplies when its input is not rounded: a residual branch then gets zeros.
    """
    weight = reference.dequantized_weight(tensors, fmt)
    weight = weight[:, : weight.shape[1] - fmt.appended]
    if fmt.hadamard_size:
        from quantkit.transforms.hadamard import rotate_back

        weight = rotate_back(weight, fmt.hadamard_size)
    channels = channels_of(tensors)
    if channels is None or fmt.branch == "residual":
        return weight
    branch = reference.branch_weight(tensors, fmt, torch.float32)[:, : len(channels)]
    return weight.index_copy(1, channels, branch)
