"""A packed embedding, and the output head that is the same matrix where the two are tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InputRejected
from quantkit.kernels import reference
from quantkit.pack.layout import tensors_of
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.site import PackedSite


class QuantEmbedding(nn.Module):
    """Token ids [..] -> rows [.., width] of a packed table [count, width].

    Only the codes and scales of the rows that are asked for are gathered and decoded, to the dtype
    of the model. Some families multiply them by `scale`.
    """

    def __init__(
        self,
        count: int,
        width: int,
        fmt: SiteFormat,
        *,
        dtype: torch.dtype = torch.bfloat16,
        scale: float | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.format = count, width, fmt
        self.dtype, self.scale = dtype, scale
        self._factor = self._rounded_scale()
        self.packed_names: tuple[str, ...] = ()
        for name, (kind, shape) in tensors_of(fmt, count, width, dtype).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
            self.packed_names += (name,)

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by the names of pack/layout.py."""
        return {name: getattr(self, name) for name in self.packed_names}

    def forward(self, input: Tensor) -> Tensor:
        """Ids [..] of any integer type -> [.., width]."""
        rows = {name: _rows(tensor, input) for name, tensor in self.packed().items()}
        found = reference.dequantized_weight(rows, self.format, self.dtype)
        return found if self._factor is None else found * self._factor

    def _rounded_scale(self) -> float | None:
        if self.scale is None:
            return None
        return torch.tensor(self.scale, dtype=self.dtype, device="cpu").item()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        # `model.to(torch.float32)` changes what rows are decoded to, not their codes.
        def same_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        self._factor = self._rounded_scale()
        super()._apply(same_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.weights}"


def _rows(tensor: Tensor, ids: Tensor) -> Tensor:
    """Rows of a stored table as bytes (not every dtype can be indexed); one number is of all."""
    if tensor.dim() < 2:
        return tensor
    return tensor.view(torch.uint8)[ids].view(tensor.dtype)


class TiedHead(QuantLinear):
    """The output head that multiplies by the embedding's table, and holds no tensors itself.

    A kernel makes a layout of its own of them: the table is then on the GPU twice.
    """

    def __init__(self, table: QuantEmbedding, fmt: SiteFormat, site: PackedSite) -> None:
        super().__init__(table.embedding_dim, table.num_embeddings, fmt, site=site, device="meta")
        for name in self.packed_names:
            delattr(self, name)
        self._table = [table]  # in a list: not a part twice
        self._device: torch.device | None = None

    def packed(self) -> dict[str, Tensor]:
        """The embedding's tensors, where the last input was."""
        found = self._table[0].packed()
        device = self._device
        return found if device is None else {name: t.to(device) for name, t in found.items()}

    def move_packed(self, device: torch.device) -> None:
        """Nothing moves: the embedding needs its table where it is."""
        self._device = None if device.type == "cpu" else device


def replace_ends(
    model: Any, head: SiteFormat | None, table: SiteFormat | None, rule: str, dtype: torch.dtype
) -> None:
    """Put packed modules (on the meta device) in place of a transformers model's ends.

    Raises InputRejected when the formats of a tied model differ, and for an embedding that does
    more than look rows up and scale them.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and (head and head.weights) != (table and table.weights):
        raise InputRejected("quantization_config: a tied head is not packed as its embedding is")
    if table is not None:
        old = model.get_input_embeddings()
        scale = getattr(old, "scalar_embed_scale", None)
        if type(old) is not nn.Embedding and scale is None:
            raise InputRejected(f"a packed embedding cannot take the place of {type(old).__name__}")
        count, width = old.num_embeddings, old.embedding_dim
        new = QuantEmbedding(count, width, table, dtype=dtype, scale=scale, device="meta")
        model.set_input_embeddings(new)
    if head is None:
        return
    site, linear = PackedSite("lm_head", head, rule), model.get_output_embeddings()
    if tied:
        model.set_output_embeddings(TiedHead(model.get_input_embeddings(), head, site))
        # Tied by hand: transformers would look for parameters.
        model._tied_weights_keys = model.all_tied_weights_keys = {}
        return
    out, width = linear.out_features, linear.in_features
    bias = linear.bias is not None
    packed = QuantLinear(width, out, head, bias=bias, dtype=dtype, site=site, device="meta")
    model.set_output_embeddings(packed)
