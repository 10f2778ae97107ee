"""The module a packed linear becomes: buffers named and shaped as in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.kernels import reference
from quantkit.pack.layout import channels_of, tensors_of
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.site import PackedSite


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
        site: PackedSite | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, fmt
        self.site = site or PackedSite("", fmt, rule)
        self.first_row = self.site.add(self)
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

    def move_packed(self, device: torch.device) -> None:
        """Move the packed tensors and nothing else."""
        for name in self.packed_names:
            self._buffers[name] = getattr(self, name).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        return self.site.compute(self, x)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """For the reference: the decoded weight in `dtype` and the separated channels (int64)."""
        source = self._source(dtype)
        if self._decoded is not None and self._decoded_from == source:
            return self._decoded
        tensors = self.packed()
        decoded = reference.weight_operand(tensors, self.format, dtype), channels_of(tensors)
        if self.keep_decoded:
            self._decoded, self._decoded_from = decoded, source
        return decoded

    def _source(self, dtype: torch.dtype) -> tuple[object, ...]:
        # Loading into the module changes where its bytes lie, or their version.
        first = self.packed()[self.packed_names[0]]
        version = 0 if first.is_inference() else first._version
        return dtype, first.device, first.data_ptr(), version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `model.to(torch.float32)` must not turn codes and scales into other numbers.
        packed = {id(tensor) for tensor in self.packed().values()}

        def same_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in packed and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self._decoded = None
        self.site.forget()
        super()._apply(same_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        branch = f", {self.format.branch} branch of {self.format.outliers}"
        return (
            f"{self.in_features}, {self.out_features}, {self.format.weights} x "
            f"{self.format.activations}{branch if self.format.branch else ''}"
        )
