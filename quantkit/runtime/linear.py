"""The module a packed linear becomes: buffers named and shaped as in the checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.kernels import reference
from quantkit.pack.layout import channels_of, tensors_of
from quantkit.pack.scheme import SiteFormat


class SharedInput:
    """The quantized input of a site, made once for all linears that read it (q, k, v).

    Holds the last operand until each of the site's `consumers` has taken it.
    """

    def __init__(self, consumers: int) -> None:
        self.consumers = consumers
        self._input: weakref.ref[Tensor] | None = None
        self._version, self._left = 0, 0
        self._operand: Tensor | None = None

    def operand(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(x)`, or what it gave for this very tensor."""
        # Inference tensors have no version: a change in place could not be seen.
        if self.consumers < 2 or torch.compiler.is_compiling() or x.is_inference():
            return make(x)
        if self._input is not None and self._input() is x and self._version == x._version:
            operand = self._operand
            assert operand is not None
            self._left -= 1
        else:
            operand = make(x)
            self._input, self._version = weakref.ref(x), x._version
            self._operand, self._left = operand, self.consumers - 1
        if self._left == 0:
            self._input = self._operand = None
        return operand


class QuantLinear(nn.Module):
    """A packed linear `y = x W^T + b` in the arithmetic of its site's format.

    x [.., in] of any float dtype; y has its dtype. The reference decodes the weight once per
    dtype and device and keeps it (`keep_decoded`), which costs the memory of an unpacked weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: SiteFormat,
        rule: str = "even",
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        site: SharedInput | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.rule = fmt, rule
        self.site = site or SharedInput(1)
        self.keep_decoded = True
        self.packed_names: tuple[str, ...] = ()
        for name, (kind, shape) in tensors_of(fmt, out_features, in_features, dtype).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
            self.packed_names += (name,)
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias: nn.Parameter | None = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._decoded: tuple[Tensor, Tensor | None] | None = None
        self._decoded_from: tuple[object, ...] = ()

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by the names of pack/layout.py."""
        return {name: getattr(self, name) for name in self.packed_names}

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        weight, channels = self._operands(reference.compute_dtype(x.dtype))
        operand = self.site.operand(x, lambda x: self._input(x, channels))
        return reference.linear(operand, weight, self.bias, x.dtype)

    def _input(self, x: Tensor, channels: Tensor | None) -> Tensor:
        divisor = self.input_global_scale if self.format.activations == "nvfp4" else None
        return reference.input_operand(x, self.format, self.rule, channels, divisor)

    def _operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self._decoded is not None and self._decoded_from == self._identity(dtype):
            return self._decoded
        tensors = self.packed()
        decoded = reference.weight_operand(tensors, self.format, dtype), channels_of(tensors)
        if self.keep_decoded:
            self._decoded, self._decoded_from = decoded, self._identity(dtype)
        return decoded

    def _identity(self, dtype: torch.dtype) -> tuple[object, ...]:
        # Moving the module or loading into it changes where its bytes lie, or their version.
        first = getattr(self, self.packed_names[0])
        return dtype, first.device, first.data_ptr(), first._version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `model.to(torch.float32)` must not turn codes and scales into other numbers.
        kept = {name: getattr(self, name).dtype for name in self.packed_names}

        def same_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            packed = any(tensor is getattr(self, name) for name in kept)
            if packed and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self._decoded = None
        return super()._apply(same_dtype, recurse)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        branch = f", branch={self.format.branch}[{self.format.outliers}]"
        return (
            f"{self.in_features}, {self.out_features}, {self.format.weights} x "
            f"{self.format.activations}{branch if self.format.branch else ''}"
        )
