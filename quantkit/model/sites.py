"""Sites: the inputs of a model's linears, as data.

A site is one tensor that one or more linears read: `attn_in` (q, k, v), `attn_out` (o), `mlp_in`
(gate, up) and `mlp_out` (down). Nothing here holds weights; `read_weight` fetches one linear's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import Checkpoint

KINDS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
READERS = ("attn_in", "mlp_in")  # fed by a norm of the residual
GENERATORS = ("attn_out", "mlp_out")  # fed by a product made inside the block


@dataclass(frozen=True)
class Linear:
    """One weight matrix [out, in], where its numbers are stored and what its module is called.

    `module` names the linear as an unfused checkpoint would ("….mlp.experts.3.up_proj") even when
    its rows live inside a fused tensor; `rows` and `expert` say which part of `tensor` it is.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    bias: str | None = None
    rows: tuple[int, int] | None = None  # row range inside a tensor that fuses several linears
    expert: int | None = None  # index into a tensor [experts, out, in]


@dataclass(frozen=True)
class Site:
    """One linear input: who reads it, who writes it, and how wide it is.

    `norm` is the gain in front of a reader (its effect is `norm_offset + weight`); `writer` the
    linear whose output rows are this site's channels, up to the repetition of KV heads
    (`writer_rows`). `unquantized` are linears that read the same input but keep their precision:
    a transform of the site must follow them too (a router). `vectors` are tensors [n, width] of
    learned vectors that the linears read beside the norm's output (depth registers).
    """

    key: str
    kind: str
    layer: int
    width: int
    linears: tuple[Linear, ...]
    expert: int | None = None
    norm: str | None = None
    norm_offset: float = 0.0
    writer: Linear | None = None
    head_dim: int = 0
    groups: int = 1  # query heads that read one KV head (attn_out)
    unquantized: tuple[Linear, ...] = ()
    vectors: tuple[str, ...] = ()

    def writer_rows(self) -> torch.Tensor:
        """Give the row of `writer` that makes each channel: int64 [width].

        Identity, except that with grouped-query attention several heads read one KV head.
        """
        channel = torch.arange(self.width)
        if self.groups == 1:
            return channel
        return channel // (self.head_dim * self.groups) * self.head_dim + channel % self.head_dim


@dataclass(frozen=True)
class ModelLayout:
    """Everything the stages need to know about a model besides its numbers."""

    model_type: str
    n_layers: int
    hidden: int
    head_dim: int
    n_heads: int
    n_kv_heads: int
    vocab: int
    sites: tuple[Site, ...]
    embedding: str
    lm_head: str | None  # None: the embedding is the head
    final_norm: str
    norm_offset: float = 0.0
    post_norms: bool = False  # a norm sits between o/down and the residual (gemma2, gemma3)
    unmatched: tuple[str, ...] = ()  # tensors that belong to nothing known: copied through
    renames: Mapping[str, str] = field(default_factory=dict)  # name in memory -> name on disk

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.lm_head is None

    @property
    def table(self) -> Linear:
        """The embedding, as the matrix [vocabulary, hidden] that it is."""
        return Linear(module_of(self.embedding), self.embedding, (self.vocab, self.hidden))

    @property
    def head(self) -> Linear | None:
        """The output head where it is a matrix of its own."""
        if self.lm_head is None:
            return None
        return Linear(module_of(self.lm_head), self.lm_head, (self.vocab, self.hidden))

    @cached_property
    def by_key(self) -> dict[str, Site]:
        """Sites by their key."""
        return {site.key: site for site in self.sites}

    @cached_property
    def _by_layer(self) -> dict[int, tuple[Site, ...]]:
        layers: dict[int, list[Site]] = {}
        for site in self.sites:
            layers.setdefault(site.layer, []).append(site)
        return {layer: tuple(sites) for layer, sites in layers.items()}

    def layer_sites(self, layer: int) -> tuple[Site, ...]:
        """Give the sites of one decoder block, in the order the data meets them."""
        return self._by_layer[layer]

    def residual_writers(self, layer: int) -> tuple[Linear, ...]:
        """Give the linears whose output is added to the residual: o, and down of every expert."""
        return tuple(
            linear
            for site in self.layer_sites(layer)
            if site.kind in GENERATORS
            for linear in site.linears
        )

    def linears(self) -> tuple[Linear, ...]:
        """Give every quantizable linear, each once."""
        return tuple(linear for site in self.sites for linear in site.linears)


def module_of(tensor: str) -> str:
    """The module a weight belongs to."""
    return tensor.removesuffix(".weight")


def read_weight(checkpoint: Checkpoint, linear: Linear) -> torch.Tensor:
    """Read one linear's weight [out, in] in the stored dtype, and no other part of its tensor."""
    return part_of(linear, _Rows(checkpoint, linear.tensor))


def part_of(linear: Linear, tensor: Any) -> torch.Tensor:
    """Take the part of `tensor` (fused or not) that is `linear`'s weight: a view [out, in]."""
    if linear.expert is not None:
        tensor = tensor[linear.expert]
    if linear.rows is not None:
        tensor = tensor[linear.rows[0] : linear.rows[1]]
    return tensor if isinstance(tensor, torch.Tensor) else tensor[:]


class _Rows:
    """A stored tensor that reads only what is asked for."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, part: int | slice) -> torch.Tensor:
        if part == slice(None):
            return self._checkpoint.read(self._name)
        return self._checkpoint.read_rows(self._name, part)
