"""The online Hadamard in torch, for kernels that have none of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.transforms.hadamard import rotate


@torch.library.custom_op("quantkit::rotate", mutates_args=())
def rotated(x: Tensor, size: int) -> Tensor:
    """`rotate` x [.., K] in blocks of `size` > 1, as float32.

    Opaque to torch.compile, which cannot trace how the matrices are made and checked.
    """
    return rotate(x.float(), size)


@rotated.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)
