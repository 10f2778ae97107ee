"""Model families as data: what the linears, norms and experts of each are called.

`describe` turns a checkpoint's configuration and tensor shapes into a `ModelLayout`. Head counts
and widths are taken from the shapes, so a configuration that leaves out a default does no harm
and one that contradicts its tensors is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from quantkit.errors import InputRejected
from quantkit.model.sites import Linear, ModelLayout, Site


class Shaped(Protocol):
    """What is known of a stored tensor without reading it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Experts:
    """Names of a mixture's parts below the block, on disk and (fused, 3-D) in memory."""

    router: str = "mlp.gate"
    module: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_router: str = "mlp.gate"
    fused_gate_up: str = "mlp.experts.gate_up_proj"  # [experts, 2 x width, hidden]
    fused_down: str = "mlp.experts.down_proj"  # [experts, hidden, width]


@dataclass(frozen=True)
class Family:
    """Names below `model.layers.N.`; a fused projection is a single name."""

    attn_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attn_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    other_norms: tuple[str, ...] = ()  # inside the block, feeding no site
    norm_offset: float = 0.0  # 1 where the norm multiplies by (1 + weight)
    post_norms: bool = False
    experts: Experts | None = None
    attn_vectors: tuple[str, ...] = ()  # learned vectors that the attn_in linears read, if present
    attn_other: tuple[str, ...] = ()  # in the attention, meeting no linear, if present


_LLAMA = Family()
_QK_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_QWEN3 = Family(other_norms=_QK_NORM)
_GEMMA2 = Family(
    mlp_norm="pre_feedforward_layernorm",
    other_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    post_norms=True,
)
_MIXTRAL = Experts(
    router="block_sparse_moe.gate",
    module="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen3": _QWEN3,
    "gemma": replace(_LLAMA, norm_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, other_norms=(*_GEMMA2.other_norms, *_QK_NORM)),
    "phi3": replace(_LLAMA, attn_in=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
    "mixtral": replace(_LLAMA, experts=_MIXTRAL),
    "qwen3_moe": replace(_QWEN3, experts=Experts()),
    "depth_register_llama": replace(
        _LLAMA, attn_vectors=("self_attn.registers",), attn_other=("self_attn.sink_key",)
    ),
}

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def make_known(model_type: object) -> None:
    """Register the family's architecture with transformers where it is one of our own."""
    if model_type == "depth_register_llama":
        from quantkit.model.depth_registers import register

        register()


def describe(config: Mapping[str, Any], tensors: Mapping[str, Shaped]) -> ModelLayout:
    """Lay out a checkpoint's sites from its configuration and its tensors' names and shapes.

    Works on packed checkpoints too (shapes are taken from `weight_packed`). Raises InputRejected
    for a family not known, a tensor that is missing, or shapes that do not fit together.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise InputRejected(
            f"unknown model family {model_type!r}", f"known families: {', '.join(sorted(FAMILIES))}"
        )
    return _Describer(family, model_type, config, tensors).layout()


class _Describer:
    """One checkpoint being described; remembers which tensors found their place."""

    def __init__(
        self,
        family: Family,
        model_type: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Shaped],
    ) -> None:
        self.family, self.model_type, self.config, self.tensors = (
            family,
            model_type,
            config,
            tensors,
        )
        self.known: set[str] = set()
        self.n_heads = self._count("num_attention_heads")

    def layout(self) -> ModelLayout:
        n_layers = self._count("num_hidden_layers")
        vocab, hidden = self._shape("model.embed_tokens", 2)
        # Layers beyond the configuration's would be ignored by every loader: say so instead.
        if f"model.layers.{n_layers}.{self.family.attn_norm}.weight" in self.tensors:
            raise InputRejected(
                f"config.json says {n_layers} layers, the tensors hold more: "
                f"model.layers.{n_layers}"
            )
        self._vector(FINAL_NORM, hidden)
        lm_head = HEAD if {HEAD, "lm_head.weight_packed"} & set(self.tensors) else None
        if lm_head is None and self.config.get("tie_word_embeddings") is False:
            raise InputRejected(f"{HEAD} is missing, and config.json says it is not tied")
        if lm_head is not None and (shape := self._shape("lm_head", 2)) != (vocab, hidden):
            raise InputRejected(f"{HEAD} is {shape}, not {(vocab, hidden)}")
        self.renames: dict[str, str] = {}
        sites = tuple(s for i in range(n_layers) for s in self._layer(i, hidden))
        attn_out = sites[1]
        return ModelLayout(
            model_type=self.model_type,
            n_layers=n_layers,
            hidden=hidden,
            head_dim=attn_out.head_dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads // attn_out.groups,
            vocab=vocab,
            sites=sites,
            embedding=EMBEDDING,
            lm_head=lm_head,
            final_norm=FINAL_NORM,
            norm_offset=self.family.norm_offset,
            post_norms=self.family.post_norms,
            unmatched=tuple(name for name in self.tensors if not self._owned(name)),
            renames=self.renames,
        )

    def _layer(self, layer: int, hidden: int) -> Iterator[Site]:
        family, at = self.family, f"model.layers.{layer}."
        for norm in family.other_norms:
            self._vector(f"{at}{norm}.weight", None)
        for norm in (family.attn_norm, family.mlp_norm):
            self._vector(f"{at}{norm}.weight", hidden)
        readers = [self._linear(at + name, hidden) for name in family.attn_in]
        out = self._linear(at + family.attn_out, None)
        if out.shape[0] != hidden or out.shape[1] % self.n_heads:
            raise InputRejected(f"{out.tensor} has shape {out.shape}: {self.n_heads} heads?")
        width, head_dim = out.shape[1], out.shape[1] // self.n_heads
        if len(readers) == 1:  # rows of q, then k, then v
            rows = readers[0].shape[0]
            kv_width = (rows - width) // 2
            values = replace(readers[0], rows=(rows - kv_width, rows), shape=(kv_width, hidden))
        else:
            values, kv_width = readers[-1], readers[-1].shape[0]
            rows = sum(r.shape[0] for r in readers)
        heads = kv_width // head_dim
        if rows != width + 2 * kv_width or kv_width % head_dim or not heads or self.n_heads % heads:
            raise InputRejected(f"{at}self_attn: the shapes of q, k, v and o do not fit together")
        vectors = tuple(at + name for name in family.attn_vectors if at + name in self.tensors)
        self.known.update(vectors, (at + name for name in family.attn_other))
        key = f"layers.{layer}."
        yield Site(
            f"{key}attn_in",
            "attn_in",
            layer,
            hidden,
            tuple(readers),
            norm=f"{at}{family.attn_norm}.weight",
            norm_offset=family.norm_offset,
            head_dim=head_dim,
            vectors=vectors,
        )
        yield Site(
            f"{key}attn_out",
            "attn_out",
            layer,
            width,
            (out,),
            writer=values,
            head_dim=head_dim,
            groups=self.n_heads // heads,
        )
        experts = family.experts
        if experts is not None and self._has_router(at, experts):
            yield from self._mixture(layer, hidden, experts)
        else:
            yield from self._dense(layer, hidden)

    def _dense(self, layer: int, hidden: int) -> Iterator[Site]:
        family, at = self.family, f"model.layers.{layer}."
        readers = [self._linear(at + name, hidden) for name in family.mlp_in]
        down = self._linear(at + family.mlp_out, None)
        if len(readers) == 1:  # rows of gate, then up
            half = readers[0].shape[0] // 2
            up = replace(readers[0], rows=(half, 2 * half), shape=(half, hidden))
            fits = readers[0].shape[0] == 2 * half
        else:
            up = readers[-1]
            fits = readers[0].shape == up.shape
        if not fits or down.shape != (hidden, up.shape[0]):
            raise InputRejected(f"{at}mlp: the shapes of gate, up and down do not fit together")
        yield self._mlp_in(layer, hidden, tuple(readers))
        key, width = f"layers.{layer}.mlp_out", down.shape[1]
        yield Site(key, "mlp_out", layer, width, (down,), writer=up)

    def _mixture(self, layer: int, hidden: int, names: Experts) -> Iterator[Site]:
        at = f"model.layers.{layer}."
        fused = f"{at}{names.fused_gate_up}" in self.tensors
        router = self._linear(at + self._router_name(at, names), hidden)
        memory_router = f"{at}{names.fused_router}.weight"
        if memory_router != router.tensor:
            self.renames[memory_router] = router.tensor
        count = router.shape[0]
        build = self._fused_expert if fused else self._expert
        parts = [build(at, e, count, hidden, names) for e in range(count)]
        readers = tuple(linear for gate, up, _ in parts for linear in (gate, up))
        yield self._mlp_in(layer, hidden, readers, (router,))
        for e, (_, up, down) in enumerate(parts):
            key = f"layers.{layer}.experts.{e}.mlp_out"
            yield Site(key, "mlp_out", layer, down.shape[1], (down,), expert=e, writer=up)

    def _expert(
        self, at: str, expert: int, count: int, hidden: int, names: Experts
    ) -> tuple[Linear, Linear, Linear]:
        module = f"{at}{names.module}.{expert}."
        gate, up = (self._linear(module + n, hidden) for n in (names.gate, names.up))
        down = self._linear(module + names.down, up.shape[0])
        if gate.shape != up.shape or down.shape[0] != hidden:
            raise InputRejected(f"{module[:-1]}: the shapes do not fit together")
        return gate, up, down

    def _fused_expert(
        self, at: str, expert: int, count: int, hidden: int, names: Experts
    ) -> tuple[Linear, Linear, Linear]:
        gate_up, down = at + names.fused_gate_up, at + names.fused_down
        shapes = []
        for name in (gate_up, down):
            if name not in self.tensors:
                raise InputRejected(f"the checkpoint has no tensor {name}")
            shapes.append(tuple(self.tensors[name].shape))
        width = shapes[0][1] // 2 if len(shapes[0]) == 3 else 0
        if shapes != [(count, 2 * width, hidden), (count, hidden, width)]:
            raise InputRejected(f"{at}{names.module}: fused experts have shapes {shapes}")
        self.known |= {gate_up, down}
        module, shape = f"{at}{names.module}.{expert}.", (width, hidden)
        return (
            Linear(module + names.gate, gate_up, shape, rows=(0, width), expert=expert),
            Linear(module + names.up, gate_up, shape, rows=(width, 2 * width), expert=expert),
            Linear(module + names.down, down, (hidden, width), expert=expert),
        )

    def _mlp_in(
        self,
        layer: int,
        hidden: int,
        linears: tuple[Linear, ...],
        unquantized: tuple[Linear, ...] = (),
    ) -> Site:
        return Site(
            f"layers.{layer}.mlp_in",
            "mlp_in",
            layer,
            hidden,
            linears,
            norm=f"model.layers.{layer}.{self.family.mlp_norm}.weight",
            norm_offset=self.family.norm_offset,
            unquantized=unquantized,
        )

    def _has_router(self, at: str, names: Experts) -> bool:
        # A mixture may keep some blocks dense; the tensors say which.
        return f"{at}{self._router_name(at, names)}.weight" in self.tensors

    def _router_name(self, at: str, names: Experts) -> str:
        on_disk = f"{at}{names.router}.weight" in self.tensors
        return names.router if on_disk else names.fused_router

    def _linear(self, module: str, width: int | None) -> Linear:
        out, columns = self._shape(module, 2)
        if width is not None and columns != width:
            raise InputRejected(f"{module}.weight has {columns} columns, not {width}")
        bias = f"{module}.bias" if f"{module}.bias" in self.tensors else None
        if bias is not None:
            self._vector(bias, out)
        return Linear(module, f"{module}.weight", (out, columns), bias)

    def _shape(self, module: str, dimensions: int) -> tuple[int, ...]:
        name, packed = f"{module}.weight", f"{module}.weight_packed"
        if name in self.tensors:
            shape = tuple(self.tensors[name].shape)
        elif packed in self.tensors:  # two 4-bit columns a byte
            shape = tuple(self.tensors[packed].shape)
            shape = (*shape[:-1], 2 * shape[-1]) if shape else shape
        else:
            raise InputRejected(f"the checkpoint has no tensor {name}")
        if len(shape) != dimensions or 0 in shape:
            raise InputRejected(f"{name} has shape {shape}: {dimensions} dimensions expected")
        appended = self._appended(module)
        if appended >= shape[-1]:
            raise InputRejected(f"{module}.outlier_index repeats more columns than there are")
        self.known.add(name)
        return (*shape[:-1], shape[-1] - appended)

    def _appended(self, module: str) -> int:
        """Columns of a packed linear that repeat others: those of a residual branch."""
        index = self.tensors.get(f"{module}.outlier_index")
        if index is None or f"{module}.outlier_weight" in self.tensors or len(index.shape) != 1:
            return 0
        return int(index.shape[0])

    def _vector(self, name: str, length: int | None) -> None:
        if name not in self.tensors:
            raise InputRejected(f"the checkpoint has no tensor {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != 1 or (length is not None and shape[0] != length):
            raise InputRejected(f"{name} has shape {shape}, not ({length},)")
        self.known.add(name)

    def _owned(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return name in self.known or f"{module}.weight" in self.known

    def _count(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputRejected(f"config.json: {key} is {value!r}, a positive integer is expected")
        return value
