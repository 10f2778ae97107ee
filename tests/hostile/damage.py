"""Good checkpoints and ways to damage them: bytes, JSON, and what stands in a file's place."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from quantkit.checkpoint.manifest import Manifest, Step
from quantkit.checkpoint.reader import INDEX

# -- good checkpoints -----------------------------------------------------------------------------


def _block(layer: int) -> dict[str, torch.Tensor]:
    p, w = f"model.layers.{layer}.", torch.ones(8, 8, dtype=torch.bfloat16)
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linears += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    norms = ("input_layernorm", "post_attention_layernorm")
    return {f"{p}{n}.weight": w.clone() for n in linears} | {
        f"{p}{n}.weight": w[0].clone() for n in norms
    }


def bases() -> list[dict[str, bytes]]:
    """File name -> bytes of some good checkpoints: single, sharded, stepped on, packed."""
    ends = {
        "model.embed_tokens.weight": torch.zeros(16, 8),
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.zeros(16, 8),
    }
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    first, second = save(ends | _block(0), {"format": "pt"}), save(_block(1))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(ends | _block(0), "a.safetensors"),
    }
    index["weight_map"] |= dict.fromkeys(_block(1), "b.safetensors")
    manifest = Manifest([Step("calibrate", {"samples": 4}, 0, {"torch": "2"}, "d" * 64)], "d" * 64)
    plan = {
        "format": 1,
        "criterion": "mode",
        "group": 32,
        "threshold": 5.0,
        "weights_digest": "d" * 64,
        "statistics_digest": None,
        "density": {"layers.0.attn_in": 0.5},
        "sites": {"layers.0.attn_in": [1, 3], "layers.0.mlp_in": []},
    }
    statistics = save(
        {"layers.0.attn_in/count": torch.tensor(4), "layers.0.attn_in/absmax": torch.ones(8)},
        {"quantkit": json.dumps({"format": 1, "weights_digest": "d" * 64})},
    )
    site = {"weights": "mxfp4", "activations": "mxfp4", "branch": "bf16", "group": 32}
    section = {
        "quant_method": "quantkit",
        "format_version": 1,
        "scheme": "osc",
        "scale_rule": "even",
        "sites": {"attn_in": site, "mlp_out": site | {"hadamard": {"block": 32}}},
        "overrides": {
            "layers.0.mlp_out": site,
            "layers.1.mlp_out": site | {"branch": "residual", "outliers": 32},
        },
        "ignore": ["lm_head"],
    }
    packed = {
        "model.layers.0.self_attn.q_proj.weight_packed": torch.zeros(8, 16, dtype=torch.uint8),
        "model.layers.0.self_attn.q_proj.weight_scale": torch.zeros(8, 1, dtype=torch.uint8),
        "model.layers.0.self_attn.q_proj.outlier_weight": torch.zeros(8, 16, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.outlier_index": torch.zeros(16, dtype=torch.int32),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_shape": torch.tensor([8, 8]),
    }
    text = {k: json.dumps(v).encode() for k, v in {"c": config, "i": index, "p": plan}.items()}
    single = {"config.json": text["c"], "model.safetensors": save(ends | _block(0) | _block(1))}
    sharded = {"config.json": text["c"], INDEX: text["i"], "a.safetensors": first}
    sharded |= {"b.safetensors": second, "tokenizer.json": b"{}"}
    stepped = single | {"quantkit.json": manifest.encode(), "outliers.json": text["p"]}
    stepped |= {"statistics.safetensors": statistics}
    ours = json.dumps(config | {"quantization_config": section}).encode()
    return [single, sharded, stepped, {"config.json": ours, "model.safetensors": save(packed)}]


# -- damage ---------------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        31,
        2**31,
        2**32,
        2**53,
        2**63,
        2**64,
        -(2**63),
        10**30,
    ),
    *(0.5, -0.0, 1e308, 1e-320, "", "a", "..", "../outside/model.safetensors", "/etc/passwd", "\0"),
    *("model.safetensors", "\ud800", "\x1b[2J", "é" * 300, "U8", "F4", "F8_E8M0", "BF16", "llama"),
    *("quantkit", "mxfp4", "compressed-tensors", "a" * 10_000),
    *(
        [],
        {},
        [[]],
        [0],
        [0, 0],
        [1, 0],
        [-1, 4],
        [2**62, 2**62],
        [0, 2**63],
        {"a": {}},
        [None],
        [""],
    ),
]


def _odd(chance: random.Random) -> Any:
    if chance.random() < 0.04:  # deep
        value: Any = 1
        for _ in range(chance.choice((10, 70, 400))):
            value = [value] if chance.random() < 0.5 else {"a": value}
        return value
    if chance.random() < 0.02:  # wide
        return [0] * chance.choice((100, 20_000))
    return copy.deepcopy(chance.choice(ODD_VALUES))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def damage_json(data: bytes, chance: random.Random) -> bytes:
    """Replace, drop, rename or copy a random part of a JSON text; sometimes write it oddly."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.choice(places)
        kind = chance.randrange(5)
        if kind == 0 and isinstance(holder, dict):
            holder[str(_odd(chance))[:2000]] = holder.pop(key)
        elif kind == 1:
            del holder[key]
        elif kind == 2:
            other, there = chance.choice(places)
            with_it = copy.deepcopy(other[there]) if there in _keys(other) else None
            if key in _keys(holder):
                holder[key] = with_it
        elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += chance.choice((-8, -1, 1, 2, 8, 2**32))
        else:
            holder[key] = _odd(chance)
    text = json.dumps(value).encode()
    kind = chance.randrange(12)
    if kind == 0:
        text = text.replace(b":", b": NaN, " if chance.random() < 0.3 else b":Infinity,", 1)
    elif kind == 1:
        text = text[:-1] + b"," + text[1:]  # every key twice
    elif kind == 2:
        text = text.decode().encode("utf-16" if chance.random() < 0.5 else "latin-1", "replace")
    elif kind == 3:
        text += bytes(chance.choice((b" ", b"\0", b"{}", b"\xff"))) * chance.randrange(1, 5)
    return text


def _keys(value: Any) -> Any:
    return value if isinstance(value, dict) else range(len(value))


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes, more often near the start."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        size = len(out)
        at = (
            chance.randrange(size + 1)
            if chance.random() < 0.4
            else chance.randrange(min(size, 400) + 1)
        )
        kind = chance.randrange(7)
        if kind == 0 and at < size:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + chance.randrange(1, 20)]
        elif kind == 3:
            out[at:at] = chance.randbytes(chance.randrange(1, 20))
        elif kind == 4:
            out[at:at] = out[at : at + chance.randrange(1, 200)]
        elif kind == 5:
            out[at : at + 8] = struct.pack(
                "<Q", chance.choice((0, 1, size, 2**31, 2**40, 2**64 - 1))
            )
        else:
            out += bytes(chance.randrange(1, 100))
    return bytes(out)


def damage_safetensors(data: bytes, chance: random.Random) -> bytes:
    """Damage the header as JSON, its length, or the file as bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = chance.randrange(4)
    if kind == 0:
        return damage_bytes(data, chance)
    if kind == 1:
        wrong = chance.choice((0, 1, length - 1, length + 1, len(data), 10**8, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[8:]
    header = damage_json(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_folder(folder: Path, name: str, outside: Path, chance: random.Random) -> None:
    """Put something that is not a plain file of its own in a file's place."""
    path = folder / name
    path.unlink(missing_ok=True)
    kind = chance.randrange(8)
    if kind == 0:
        path.symlink_to(outside / "model.safetensors")
    elif kind == 1:
        path.symlink_to(os.path.relpath(outside / name, folder))
    elif kind == 2:
        path.symlink_to(name)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        os.mkfifo(path)
    elif kind == 5:
        path.touch()
    elif kind == 6:
        path.symlink_to(chance.choice(("/dev/zero", "/dev/stdin", "..", "/proc/self/mem")))
    # 7: gone


def build(folder: Path, outside: Path, files: dict[str, bytes], chance: random.Random) -> None:
    """Write a checkpoint with one to three of its files damaged."""
    files = dict(files)
    victims = chance.choices(sorted(files), k=chance.choice((1, 1, 1, 2, 3)))
    odd_places = []
    for name in victims:
        if chance.random() < 0.08:
            odd_places.append(name)
        elif name.endswith(".safetensors"):
            try:
                files[name] = damage_safetensors(files[name], chance)
            except (ValueError, struct.error):  # damaged twice: no header left
                files[name] = damage_bytes(files[name], chance)
        elif chance.random() < 0.25:
            files[name] = damage_bytes(files[name], chance)
        else:
            try:
                files[name] = damage_json(files[name], chance)
            except (ValueError, TypeError):
                files[name] = damage_bytes(files[name], chance)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name in sorted(set(odd_places)):
        damage_folder(folder, name, outside, chance)
