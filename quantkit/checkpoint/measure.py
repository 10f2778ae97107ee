"""True bits per weight, counted from the tensors on disk, and the format each site has.

A decoder linear costs everything stored under its name: codes, scales, branch, indices. Embedding
and head are counted apart; biases, norms and routers only in the figure for the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.reader import Checkpoint

KINDS = {
    "attn_in": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "attn_out": ("o_proj", "out_proj"),
    "mlp_in": ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
    "mlp_out": ("down_proj", "w2"),
}
OUTSIDE = {"embed_tokens": "embedding", "lm_head": "head"}
_KIND_OF = {leaf: kind for kind, leaves in KINDS.items() for leaf in leaves}
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+\.")
# Tensors of a linear beside its weight; fused experts carry them as suffixes of the name.
_PART = re.compile(
    r"[._](weight(_\w+)?|outlier_\w+|residual_\w+|input_scale|input_global_scale|packed|blocks"
    r"|scales?|global_scale)$"
)
_BIAS = re.compile(r"[._]bias$")


@dataclass(frozen=True)
class Linears:
    """The linears of one site kind (or outside): how many, their weights, their bytes on disk."""

    kind: str
    count: int
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, everything counted."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint's weights cost."""

    linears: tuple[Linears, ...]  # by site kind
    parameters: int  # of the whole model
    nbytes: int  # of all its tensors
    outside: tuple[Linears, ...] = ()  # embedding, and a head of its own

    @property
    def linear_bits(self) -> float:
        """Bits per weight of the decoder linears."""
        weights = sum(part.weights for part in self.linears)
        return 8 * sum(part.nbytes for part in self.linears) / weights if weights else 0.0

    @property
    def model_bits(self) -> float:
        """Bits per parameter of the whole model."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Count weights and bytes of every decoder linear and of the whole model."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        base, part = _split(name)
        modules.setdefault(base, {})[part] = info
    found: dict[str, list[int]] = {kind: [0, 0, 0] for kind in (*KINDS, *OUTSIDE.values())}
    parameters = total = 0
    for base, parts in modules.items():
        weights = _weights(checkpoint, parts)
        bias = parts.get("bias")
        nbytes = sum(info.nbytes for info in parts.values())
        total += nbytes
        parameters += weights + (bias.nbytes // bias.dtype.itemsize if bias else 0)
        leaf = base.rsplit(".", 1)[-1]
        kind = _KIND_OF.get(leaf) if _LAYER.search(base) else OUTSIDE.get(leaf)
        if kind is not None and weights:
            row = found[kind]
            row[0] += 1
            row[1] += weights
            row[2] += nbytes - (bias.nbytes if bias else 0)
    parts_found = [Linears(kind, *row) for kind, row in found.items() if row[0]]
    linears = tuple(part for part in parts_found if part.kind in KINDS)
    outside = tuple(part for part in parts_found if part.kind not in KINDS)
    return Sizes(linears, parameters, total, outside)


def _split(name: str) -> tuple[str, str]:
    """Module and part: `a.q_proj.weight_scale` -> (`a.q_proj`, `weight_scale`)."""
    if match := _BIAS.search(name):
        return name[: match.start()], "bias"
    if match := _PART.search(name):
        return name[: match.start()], match[1]
    return name, "weight"


def _weights(checkpoint: Checkpoint, parts: Mapping[str, TensorInfo]) -> int:
    """How many weights a module has, whatever they are packed in."""
    main = next(
        (parts[p] for p in ("weight_packed", "packed", "blocks", "weight") if p in parts), None
    )
    if main is None:
        return 0
    count = main.nbytes // main.dtype.itemsize
    index = parts.get("outlier_index")
    if index is not None and "outlier_weight" not in parts and main.shape:
        # A residual branch: columns of the main path that are no weights of their own.
        appended = main.shape[0] * (index.nbytes // index.dtype.itemsize)
    else:
        appended = 0
    shape = parts.get("weight_shape")  # of integer formats, whose last word may be padded
    if shape is not None and shape.nbytes <= 256:
        dims = checkpoint.read(shape.name).flatten().tolist()
        return int(torch.tensor(dims, dtype=torch.float64).prod().item())
    if main.dtype is torch.float4_e2m1fn_x2:
        return 2 * count
    scaled = any("scale" in part for part in parts)
    if main.dtype is torch.uint8 and scaled:
        return max(2 * count - appended, 0)
    if main.dtype is torch.int32 and scaled:
        return 8 * count
    return max(count - appended, 0)


def site_formats(config: Mapping[str, Any], linears: tuple[Linears, ...]) -> dict[str, str]:
    """Site kind -> its format in words, from `quantization_config`; foreign ones are named."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        dtype = config.get("dtype") or config.get("torch_dtype") or "not quantized"
        return {part.kind: str(dtype) for part in linears}
    if section.get("quant_method") != "quantkit":
        text = _foreign(section)
        return {part.kind: text for part in linears}
    sites, overrides = section.get("sites"), section.get("overrides")
    words = {}
    for part in linears:
        site = sites.get(part.kind) if isinstance(sites, dict) else None
        words[part.kind] = _site(site)
        if isinstance(overrides, dict):
            own = [v for k, v in overrides.items() if str(k).rsplit(".", 1)[-1] == part.kind]
            others = sorted({_site(v) for v in own})
            if others:
                words[part.kind] += f"; {len(own)} sites {', '.join(others)}"
    return words


def outside_formats(checkpoint: Checkpoint, counted: Sizes) -> dict[str, str]:
    """The formats of embedding and head in words: of codes as their scales' method names them."""
    section = checkpoint.config.get("quantization_config")
    words = {}
    for name, info in checkpoint.tensors.items():
        base, part = _split(name)
        kind = OUTSIDE.get(base.rsplit(".", 1)[-1])
        if kind is None or _LAYER.search(base) or part not in ("weight", "weight_packed"):
            continue
        words[kind] = str(info.dtype).removeprefix("torch.")
        if isinstance(section, dict) and f"{base}.weight_scale" in checkpoint.tensors:
            site = section.get(kind)
            name = str(site.get("weights"))[:80] if isinstance(site, dict) else "not quantized"
            ours = section.get("quant_method") == "quantkit"
            words[kind] = name if ours else _foreign(section)
    return {part.kind: words[part.kind] for part in counted.outside if part.kind in words}


def _site(site: object) -> str:
    if not isinstance(site, dict) or not site.get("weights"):
        return "not quantized"
    weights, activations = str(site["weights"]), site.get("activations")
    text = weights if activations == weights else f"{weights} (activations {activations or '16'})"
    if site.get("branch"):
        text += f" + {site['branch']} branch"
    hadamard = site.get("hadamard")
    if isinstance(hadamard, dict) and hadamard:
        text += f", Hadamard {next(iter(hadamard.values()))}"
    return text[:80]


def _foreign(section: Mapping[str, Any]) -> str:
    method = str(section.get("quant_method", "unknown"))
    form = section.get("format") or section.get("quant_algo") or section.get("forward_dtype")
    groups = section.get("config_groups")
    if isinstance(groups, dict):
        for group in groups.values():
            own = group.get("format") if isinstance(group, dict) else None
            form = form or own
    bits = section.get("bits") or section.get("w_bit")
    detail = form or (f"{bits} bits" if bits else None)
    return (f"{method} {detail}" if detail else method)[:80]
