"""One site at run time: the packed linears that read the same input, and what computes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.formats import e8m0
from quantkit.kernels import dispatch, reference
from quantkit.pack.scheme import SiteFormat

if TYPE_CHECKING:
    from quantkit.runtime.linear import QuantLinear


class PackedSite:
    """Members (q, k, v) share one quantization of their input, or one kernel for all of them.

    What computes them is chosen on first use, for the device and dtype in use then, and again
    when those change. A kernel has a layout of its own: once it is prepared, the checkpoint's
    tensors move to the CPU, where saving and moving the model still find them. The last shared
    result is held until every member has taken it. A norm may hand its input on for the kernel to
    normalise (`hand_on`).
    """

    def __init__(self, key: str, fmt: SiteFormat, rule: str) -> None:
        self.key, self.format, self.rule = key, fmt, rule
        self.members: list[QuantLinear] = []
        self._chosen_for: tuple[torch.device, torch.dtype] | None = None
        self._kernel: nn.Module | None = None
        self._input: Tensor | None = None
        self._version = 0
        self._result: Tensor | None = None
        self._taken: tuple[int, ...] = ()  # first rows of the members that have the result
        self._handed: Tensor | None = None  # an input that is still to be normalised, and how
        self._norm: tuple[Tensor, float] | None = None

    def add(self, member: QuantLinear) -> int:
        """Take a linear in; returns the first row of the site's outputs that is its own."""
        first = sum(other.out_features for other in self.members)
        self.members.append(member)
        return first

    def compute(self, member: QuantLinear, x: Tensor) -> Tensor:
        """The output of one member, x [.., in] -> [.., out]."""
        if self.kernel(x) is None:
            weight, channels = member.operands(reference.compute_dtype(x.dtype))
            operand = self._shared(member, x, lambda x: self._operand(member, x, channels))
            return reference.linear(operand, weight, member.bias, x.dtype)
        output = self._shared(member, x, self.joined)
        part = output[:, member.first_row : member.first_row + member.out_features]
        return part.reshape(*x.shape[:-1], member.out_features)

    def joined(self, x: Tensor) -> Tensor:
        """All members' outputs side by side, x [.., in] -> [tokens, sum of outs], by the kernel."""
        kernel: Any = self.kernel(x)
        rows = x.reshape(-1, x.shape[-1])
        if x is not self._handed:
            output: Tensor = kernel(rows)
            return output
        assert self._norm is not None
        gain, epsilon = self._norm
        self._handed = self._norm = None
        normed: Tensor = kernel.normed(rows, gain, epsilon)
        return normed

    def hand_on(self, x: Tensor, gain: Tensor, epsilon: float) -> Tensor | None:
        """x under an identity of its own: given that, members compute on norm(x).

        None where the kernel does not normalise, or not in these types.
        """
        if not hasattr(self.kernel(x), "normed"):
            return None
        if (gain.device, gain.dtype, gain.shape[0]) != (x.device, x.dtype, x.shape[-1]):
            return None
        self._handed, self._norm = x.view(x.shape), (gain, epsilon)
        return self._handed

    def kernel(self, x: Tensor) -> nn.Module | None:
        """What computes all members on the device and in the dtype of x; None: the reference."""
        if self._chosen_for != (x.device, x.dtype):
            self.choose(x.device, x.dtype)
        return self._kernel

    def prepared(self) -> weakref.ref[nn.Module] | None:
        """The kernel chosen last; another one, even at the same place, is not equal to it."""
        return None if self._kernel is None else weakref.ref(self._kernel)

    def forget(self) -> None:
        """Choose again on the next use (the members' tensors moved or changed)."""
        self._chosen_for = self._kernel = self._input = self._result = None
        self._handed = self._norm = None

    @torch.compiler.disable
    def choose(self, device: torch.device, dtype: torch.dtype) -> None:
        """Pick and prepare what computes the members on `device` in `dtype`."""
        work = dispatch.Work(
            weights=self.format.weights,
            activations=self.format.activations,
            branch=self.format.branch,
            rule=self.rule,
            hadamard=self.format.hadamard,
            width=self.members[0].in_features,
            outputs=tuple(member.out_features for member in self.members),
            outliers=self.format.outliers,
            dtype=dtype,
        )
        self.forget()
        linears = []
        for member in self.members:
            member.move_packed(device)
            bias = {} if member.bias is None else {"bias": member.bias}
            linears.append(for_kernels(member.packed()) | bias)
        self._kernel = dispatch.prepare(self.key, work, linears, device)
        self._chosen_for = (device, dtype)
        if self._kernel is not None:
            for member in self.members:
                member.move_packed(torch.device("cpu"))
            for tensor in self._kernel.buffers():
                # Without this a CUDA graph of torch.compile copies the weights at every replay.
                torch._dynamo.mark_static_address(tensor, guard=False)

    def _operand(self, member: QuantLinear, x: Tensor, channels: Tensor | None) -> Tensor:
        divisor = member.packed().get("input_global_scale")
        return reference.input_operand(x, self.format, self.rule, channels, divisor)

    def _shared(self, member: QuantLinear, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(x)`, or what it gave another member for this very tensor."""
        if len(self.members) < 2:
            return make(x)
        # Inference tensors count no changes in place (nor does tracing); that no member takes a
        # result twice keeps a buffer that is filled anew for each step from being mistaken.
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        if self._input is not x or self._version != version or member.first_row in self._taken:
            self._result = make(x)
            self._input, self._version, self._taken = x, version, ()
        result = self._result
        assert result is not None
        self._taken = (*self._taken, member.first_row)
        if len(self._taken) == len(self.members):
            self._input = self._result = None
        return result


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Choose what computes every packed site of `model` now rather than on first use."""
    from quantkit.runtime.linear import QuantLinear

    for module in model.modules():
        if isinstance(module, QuantLinear) and module.first_row == 0:
            module.site.choose(next(iter(module.packed().values())).device, dtype)


def for_kernels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as kernels take them: the scales of an FP8 branch as float32 numbers."""
    scale = tensors.get("outlier_weight_scale")
    return tensors if scale is None else tensors | {"outlier_weight_scale": e8m0.decode(scale)}
