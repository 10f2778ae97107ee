"""Small checkpoints made byte by byte, so that any rule of the format can be broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def sharded(folder: Path, shards: int = 2, per_shard: int = 3) -> Path:
    """A small sharded checkpoint with files beside the weights, harmless and not."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    weight_map = {}
    for s in range(shards):
        name = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"layer.{s}.{i}": torch.randn(8, 16, generator=generator).to(torch.bfloat16)
            for i in range(per_shard)
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return folder


def safetensors(
    header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """The bytes of a file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def single(
    folder: Path, file: bytes | None = None, config: bytes = b'{"model_type":"llama"}'
) -> Path:
    """A checkpoint of one file with these bytes (default: a good one)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(config)
    if file is None:
        file = safetensors({"a": entry("U8", [4], 0, 4)}, b"abcd")
    (folder / "model.safetensors").write_bytes(file)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
