"""Fold linear maps of channels into the tensors around them, exactly: edits, tensor by tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.model.sites import Linear, Site

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
PIECE = 1 << 22  # elements edited at once in float64, where the edits allow pieces


@dataclass(frozen=True)
class Edit:
    """One change of (a part of) a tensor: `function` maps vectors of channels [.., n], float64.

    `axis` 1 takes the rows of a matrix [out, in] as vectors (of input channels), axis 0 its
    columns (of output channels); a tensor of one dimension is a single vector. `rows` and `expert`
    choose the part, as in `Linear`.
    """

    axis: int
    function: Callable[[Tensor], Tensor]
    rows: tuple[int, int] | None = None
    expert: int | None = None


Edits = dict[str, list[Edit]]  # by tensor name, in the order they are applied


def add(edits: Edits, more: Iterable[tuple[str, Edit]]) -> None:
    """Append edits to those already planned."""
    for name, edit in more:
        edits.setdefault(name, []).append(edit)


def inputs(
    linears: Iterable[Linear], function: Callable[[Tensor], Tensor]
) -> Iterable[tuple[str, Edit]]:
    """Map the input channels of linears: W -> W M for a function x -> x M."""
    for linear in linears:
        yield linear.tensor, Edit(1, function, linear.rows, linear.expert)


def outputs(linear: Linear, function: Callable[[Tensor], Tensor]) -> Iterable[tuple[str, Edit]]:
    """Map the output channels of a linear, bias included: W -> M^T W for a function y -> y M."""
    yield linear.tensor, Edit(0, function, linear.rows, linear.expert)
    if linear.bias is not None:
        yield linear.bias, Edit(1, function, linear.rows)


def vectors(
    names: Iterable[str], function: Callable[[Tensor], Tensor]
) -> Iterable[tuple[str, Edit]]:
    """Map stored vectors [n, width]: v -> v M for a function x -> x M."""
    for name in names:
        yield name, Edit(1, function)


def gain(name: str, offset: float, function: Callable[[Tensor], Tensor]) -> tuple[str, Edit]:
    """Map the gain of a norm, which multiplies by offset + weight."""
    return name, Edit(1, lambda weight: function(weight + offset) - offset)


def fuse_gain(
    linears: Iterable[Linear],
    norm: str,
    offset: float,
    read: Callable[[str], Tensor],
    beside: Iterable[str] = (),
) -> Iterable[tuple[str, Edit]]:
    """Move a norm's gain into the linears that read it; the gain becomes one.

    `beside` names tensors of vectors that the linears read too, without the norm.
    """
    yield from inputs(linears, lambda w: w * (offset + read(norm).double()))
    yield from vectors(beside, lambda v: v / (offset + read(norm).double()))
    yield gain(norm, offset, torch.ones_like)


def scale(site: Site, s: Tensor) -> Iterable[tuple[str, Edit]]:
    """Divide a site's channels by s [width] where they are made, multiply where they are read.

    Made by the norm's gain (readers), the up rows (mlp_out) or the v rows (attn_out), whose heads
    must agree on s where several query heads read one of them. Raises ValueError otherwise.
    """
    s = s.double()
    yield from inputs((*site.linears, *site.unquantized), lambda w: w * s)
    if site.norm is not None:
        yield gain(site.norm, site.norm_offset, lambda g: g / s)
        yield from vectors(site.vectors, lambda v: v / s)
        return
    assert site.writer is not None
    rows = site.writer_rows()
    made = torch.ones(site.writer.shape[0], dtype=torch.float64)
    made[rows] = s
    if not torch.equal(made[rows], s):
        raise ValueError(f"{site.key}: query heads that share a KV head need one scale")
    yield from outputs(site.writer, lambda v: v / made)


def edited(tensor: Tensor, edits: Sequence[Edit], dtype: torch.dtype | None = None) -> Tensor:
    """Apply edits in float64 and round once, to `dtype` (default: the tensor's own)."""
    out = tensor.to(dtype or tensor.dtype, copy=True)
    if tensor.dim() == 3:
        for expert in sorted({e.expert for e in edits if e.expert is not None}):
            mine = [e for e in edits if e.expert == expert]
            out[expert] = _edit_matrix(tensor[expert], mine, out.dtype)
        return out
    if tensor.dim() == 1:
        return _edit_matrix(tensor[None], edits, out.dtype)[0]
    return _edit_matrix(tensor, edits, out.dtype)


def _edit_matrix(matrix: Tensor, edits: Sequence[Edit], dtype: torch.dtype) -> Tensor:
    if all(edit.axis == 1 and edit.rows is None for edit in edits):
        rows = max(PIECE // matrix.shape[1], 1)  # rows do not meet: no need to hold all in float64
        pieces = []
        for piece in matrix.split(rows):
            work = piece.double()
            for edit in edits:
                work = edit.function(work)
            pieces.append(work.to(dtype))
        return torch.cat(pieces)
    work = matrix.to(torch.float64, copy=True)
    vector = matrix.shape[0] == 1
    for edit in edits:
        first, last = edit.rows or (0, matrix.shape[1 if vector else 0])
        if vector:
            work[:, first:last] = edit.function(work[:, first:last])
        elif edit.axis == 1:
            work[first:last] = edit.function(work[first:last])
        else:
            work[first:last] = edit.function(work[first:last].T).T
    return work.to(dtype)


def write_edited(
    writer: CheckpointWriter,
    source: Checkpoint,
    edits: Mapping[str, Sequence[Edit]],
    dtype: torch.dtype | None = None,
) -> int:
    """Write every edited tensor, keep the others; with `dtype`, convert all. Returns the edited."""
    for name, info in source.tensors.items():
        planned = edits.get(name, ())
        convert = dtype is not None and info.dtype.is_floating_point and info.dtype != dtype
        if not planned and not convert:
            writer.keep(name)
        elif not writer.done(name):
            writer.write(name, edited(source.read(name), planned, dtype))
    return len(edits)


def return_freed_memory() -> None:
    """Let glibc give freed tensors back to the system at once, from here on.

    By itself it raises the size from which it does so, up to 32 MB, with every larger block that
    is freed. Pieces of tensors then leave holes in its heap, the more the more layers there are.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
