"""Rotate: orthogonal changes of basis, folded into the weights or recorded for run time.

    R1   the residual stream: embedding, readers, writers, head      folded
    R2   each head between v and o                                   folded
    R3   queries and keys after the position embedding               recorded (for a 4-bit KV cache)
    R4   the input of down                                           recorded (online)

`block` records an online block Hadamard at chosen sites and folds nothing. What is recorded stands
in the manifest (`notes["online"]`) until `pack` rotates the packed weights and tells the runtime.
QuaRot (2404.00456); blocks as in MR-GPTQ (2509.23202).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import console
from quantkit.calibrate import store
from quantkit.checkpoint.step import Target, begin_step, open_source, output_of
from quantkit.errors import InputRejected, UsageError
from quantkit.model.families import HEAD, describe
from quantkit.model.sites import KINDS, Linear, ModelLayout
from quantkit.transforms import carry, fold
from quantkit.transforms.hadamard import factors, largest_size, random_signs, rotate

HADAMARD_KINDS = ("hadamard", "random-hadamard", "block")
BLOCKS = (16, 32, 64, 128)
PARTS = ("r1", "r2", "r3", "r4")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class RotateOptions:
    """What the user chose. `kind` None follows the evidence for `scheme` (see `default_kind`)."""

    kind: str | None = None
    scheme: str = "mxfp4"
    block: int = 32
    sites: tuple[str, ...] = KINDS
    parts: tuple[str, ...] = PARTS
    seed: int = 0
    dtype: str | None = None


@dataclass
class Rotation:
    """What a rotation does to one model."""

    edits: fold.Edits = field(default_factory=dict)
    online: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)  # sites whose inputs change
    untie: fold.Edits = field(default_factory=dict)  # how a tied head is made from the embedding
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RotateResult:
    """What was written, or with --dry-run would be."""

    output: Path
    notes: dict[str, Any]
    said: list[str]
    edited: int
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "output": str(self.output),
            "edited": self.edited,
            "tensors": self.tensors,
            "said": self.said,
        } | self.notes

    def text(self) -> str:
        """For people."""
        lines = [f"{self.output}: {self.edited} of {self.tensors} tensors change"]
        for name in ("r1", "r2", "r3"):
            if name in self.notes:
                where = "recorded for a KV cache" if name == "r3" else "folded"
                lines.append(f"{name.upper()}: Hadamard of {self.notes[name]['size']}, {where}")
        for key, form in self.notes["online"].items():
            shape = " of ".join(map(str, next(iter(form.items()))))
            lines.append(f"{key}: online Hadamard, {shape}, applied by pack")
        return "\n".join(lines)


def default_kind(scheme: str) -> str:
    """The rotation that helps a scheme: blocks of 32 for MXFP4, global for INT4, none for NVFP4.

    A global rotation makes every block look Gaussian, which takes from a block format its quiet
    blocks; NVFP4's blocks of 16 lose by any rotation (2509.23202, 2511.04214).
    """
    if scheme in ("mxfp4", "osc"):
        return "block"
    if scheme == "int4":
        return "hadamard"
    raise UsageError(
        f"no rotation is known to help {scheme}",
        f"leave this step out, or give --kind {'|'.join(HADAMARD_KINDS)}",
    )


def rotate_checkpoint(
    checkpoint: str | Path | None, options: RotateOptions, target: Target, *, dry_run: bool = False
) -> RotateResult:
    """Write the rotated checkpoint; its function is the input's.

    Raises InputRejected for a packed checkpoint or a model whose residual cannot be rotated
    (norms behind o and down), UsageError for options that make no sense.
    """
    fold.return_freed_memory()
    source = open_source(checkpoint)
    if "quantization_config" in source.config:
        raise InputRejected(
            f"{source.path}: is packed already", "rotate the checkpoint it was made from"
        )
    layout = describe(source.config, source.tensors)
    rotation = plan(layout, options, source.read)
    output = output_of(source, "rotated", target)
    for line in rotation.said:
        console.note(line)
    notes = rotation.notes | {"online": rotation.online}
    edited = len(source.tensors) if options.dtype else len(rotation.edits | rotation.untie)
    result = RotateResult(output, notes, rotation.said, edited, len(source.tensors))
    if dry_run:
        return result
    recorded = {
        "kind": options.kind or default_kind(options.scheme),
        "block": options.block,
        "sites": list(options.sites),
        "parts": list(options.parts),
        "dtype": options.dtype,
    }
    with begin_step(
        "rotate", source, options=recorded, suffix="rotated", target=target, seed=options.seed
    ) as step:
        dtype = DTYPES[options.dtype] if options.dtype else None
        fold.write_edited(step.writer, source, rotation.edits, dtype)
        if rotation.untie and not step.writer.done(HEAD):
            head = source.read(layout.embedding)
            step.writer.write(HEAD, fold.edited(head, rotation.untie[HEAD], dtype))
        config = dict(source.config)
        if rotation.untie:
            config["tie_word_embeddings"] = False
        if dtype is not None:
            config["dtype"] = options.dtype
            config.pop("torch_dtype", None)
        if config != source.config:
            step.writer.write_file("config.json", (json.dumps(config, indent=2) + "\n").encode())
        statistics = None
        if rotation.edits or dtype is not None:
            statistics = carry.carry_statistics(step, {}, rotation.dropped)
        elif (source.path / store.FILE).exists():
            statistics = store.load_statistics(source).digest
        step.notes |= notes
        step.finish(statistics_digest=statistics)
    return result


def plan(layout: ModelLayout, options: RotateOptions, read: Callable[[str], Tensor]) -> Rotation:
    """Decide every edit and every record; tensors are read (`read`) when an edit is applied."""
    kind = options.kind or default_kind(options.scheme)
    if kind not in HADAMARD_KINDS:
        raise UsageError(f"--kind {kind}: one of {', '.join(HADAMARD_KINDS)}")
    if options.dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {options.dtype}: one of {', '.join(DTYPES)}")
    rotation = Rotation()
    if kind == "block":
        _blocks(layout, options, rotation)
        return rotation
    unknown = set(options.parts) - set(PARTS)
    if unknown or not options.parts:
        raise UsageError(f"--parts: some of {','.join(PARTS)}")
    generator = torch.Generator().manual_seed(options.seed)
    random = kind == "random-hadamard"
    if "r1" in options.parts:
        mix = _mixer(layout.hidden, "R1", rotation, random, generator)
        _residual(layout, rotation, mix, read)
    if "r2" in options.parts:
        _heads(layout, rotation, random, generator)
    if "r3" in options.parts:
        rotation.notes["r3"] = {"size": _size(layout.head_dim, "R3", rotation)}
    if "r4" in options.parts:
        _online(layout, ("mlp_out",), lambda width: _form(width, "R4", rotation), rotation)
    return rotation


def _blocks(layout: ModelLayout, options: RotateOptions, rotation: Rotation) -> None:
    if options.block not in BLOCKS:
        raise UsageError(f"--block {options.block}: one of {', '.join(map(str, BLOCKS))}")
    if not options.sites or set(options.sites) - set(KINDS):
        raise UsageError(f"--sites: some of {','.join(KINDS)}")

    def form(width: int) -> dict[str, int]:
        block = options.block
        while width % block:
            block //= 2
        if block < options.block:
            _say(rotation, f"blocks of {options.block} do not divide {width} channels: {block}")
        return {"block": block}

    _online(layout, options.sites, form, rotation)


def _online(
    layout: ModelLayout,
    kinds: Iterable[str],
    form: Callable[[int], dict[str, int]],
    rotation: Rotation,
) -> None:
    """Record by kind, and by key where a site's width asks for another form."""
    for kind in kinds:
        sites = [site for site in layout.sites if site.kind == kind]
        for site in sites:
            found = form(site.width)
            if rotation.online.setdefault(kind, found) != found:
                rotation.online[site.key] = found


def _residual(
    layout: ModelLayout,
    rotation: Rotation,
    mix: Callable[[Tensor], Tensor],
    read: Callable[[str], Tensor],
) -> None:
    if layout.post_norms:
        raise InputRejected(
            f"{layout.model_type}: norms behind o and down keep the residual from being rotated",
            "give --kind block, or --parts r2,r4",
        )
    edits = rotation.edits
    for site in layout.sites:
        if site.norm is not None:
            readers = (*site.linears, *site.unquantized)
            gain = fold.fuse_gain(readers, site.norm, site.norm_offset, read, site.vectors)
            fold.add(edits, gain)
            fold.add(edits, (*fold.inputs(readers, mix), *fold.vectors(site.vectors, mix)))
            rotation.dropped.add(site.key)
    for layer in range(layout.n_layers):
        for linear in layout.residual_writers(layer):
            fold.add(edits, fold.outputs(linear, mix))
    fold.add(edits, [(layout.embedding, fold.Edit(1, mix))])
    head = Linear("lm_head", layout.lm_head or HEAD, (layout.vocab, layout.hidden))
    for name, edit in (
        *fold.fuse_gain((head,), layout.final_norm, layout.norm_offset, read),
        *fold.inputs((head,), mix),
    ):
        # A tied head is made from the embedding as it was, not edited in place.
        into = rotation.untie if layout.tied and name == head.tensor else edits
        fold.add(into, [(name, edit)])
    if layout.tied:
        rotation.notes["untied"] = True
        _say(rotation, "the head shared the embedding: it now is a tensor of its own")


def _heads(
    layout: ModelLayout, rotation: Rotation, random: bool, generator: torch.Generator
) -> None:
    mix = _mixer(layout.head_dim, "R2", rotation, random, generator)
    for site in layout.sites:
        if site.kind == "attn_out":
            assert site.writer is not None
            fold.add(rotation.edits, fold.outputs(site.writer, mix))
            fold.add(rotation.edits, fold.inputs(site.linears, mix))
            rotation.dropped.add(site.key)


def _mixer(
    n: int, name: str, rotation: Rotation, random: bool, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    size = _size(n, name, rotation)
    rotation.notes[name.lower()] = {"size": size, "random_signs": random}
    signs = random_signs(n, generator) if random else torch.ones(n, dtype=torch.float64)

    def mix(x: Tensor) -> Tensor:
        return rotate((x.unflatten(-1, (-1, n)) * signs).flatten(-2), size)

    return mix


def _size(n: int, name: str, rotation: Rotation) -> int:
    if factors(n) is not None:
        return n
    size = largest_size(n)
    _say(rotation, f"{name}: no Hadamard of size {n} can be constructed, using blocks of {size}")
    return size


def _form(width: int, name: str, rotation: Rotation) -> dict[str, int]:
    size = _size(width, name, rotation)
    return {"size": size} if size == width else {"block": size}


def _say(rotation: Rotation, line: str) -> None:
    if line not in rotation.said:
        rotation.said.append(line)
