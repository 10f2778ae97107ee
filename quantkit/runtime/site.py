"""One site at run time: the packed linears that read the same input, and what computes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.kernels import dispatch, reference
from quantkit.pack.scheme import SiteFormat

if TYPE_CHECKING:
    from quantkit.runtime.linear import QuantLinear


class PackedSite:
    """Members (q, k, v) share one quantization of their input, or one kernel for all of them.

    What computes them is chosen on first use, for the device and dtype in use then, and again
    when those change. The last shared result is held until every member has taken it.
    """

    def __init__(self, key: str, fmt: SiteFormat, rule: str) -> None:
        self.key, self.format, self.rule = key, fmt, rule
        self.members: list[QuantLinear] = []
        self._chosen_for: tuple[torch.device, torch.dtype] | None = None
        self._kernel: nn.Module | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._version, self._taken = 0, set[int]()
        self._result: Tensor | None = None

    def compute(self, member: QuantLinear, x: Tensor) -> Tensor:
        """The output of one member, x [.., in] -> [.., out]."""
        if self._chosen_for != (x.device, x.dtype):
            self._choose(x)
        kernel = self._kernel
        if kernel is None:
            weight, channels = member.operands(reference.compute_dtype(x.dtype))
            operand = self._shared(member, x, lambda x: self._operand(member, x, channels))
            return reference.linear(operand, weight, member.bias, x.dtype)
        output = self._shared(member, x, lambda x: kernel(x.reshape(-1, x.shape[-1])))
        first = sum(m.out_features for m in self.members[: self.members.index(member)])
        part = output[:, first : first + member.out_features]
        return part.reshape(*x.shape[:-1], member.out_features)

    def forget(self) -> None:
        """Choose again on the next use (the members' tensors moved or changed)."""
        self._chosen_for = self._kernel = self._input = self._result = None

    def _choose(self, x: Tensor) -> None:
        work = dispatch.Work(
            weights=self.format.weights,
            activations=self.format.activations,
            branch=self.format.branch,
            rule=self.rule,
            hadamard=self.format.hadamard,
            width=self.members[0].in_features,
            outputs=tuple(member.out_features for member in self.members),
            outliers=self.format.outliers,
            dtype=x.dtype,
        )
        linears = []
        for member in self.members:
            bias = {} if member.bias is None else {"bias": member.bias}
            linears.append(member.packed() | bias)
        self._kernel = dispatch.prepare(self.key, work, linears, x.device)
        self._chosen_for = (x.device, x.dtype)

    def _operand(self, member: QuantLinear, x: Tensor, channels: Tensor | None) -> Tensor:
        divisor = member.packed().get("input_global_scale")
        return reference.input_operand(x, self.format, self.rule, channels, divisor)

    def _shared(self, member: QuantLinear, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(x)`, or what it gave another member for this very tensor."""
        if len(self.members) < 2 or torch.compiler.is_compiling():
            return make(x)
        # Inference tensors count no changes in place; that no member takes a result twice keeps
        # a buffer that is filled anew for each step from being mistaken for the last one.
        version = 0 if x.is_inference() else x._version
        known = self._input is not None and self._input() is x and self._version == version
        if not known or id(member) in self._taken:
            self._result = make(x)
            self._input, self._version, self._taken = weakref.ref(x), version, set()
        result = self._result
        assert result is not None
        self._taken.add(id(member))
        if len(self._taken) == len(self.members):
            self._input = self._result = None
        return result
