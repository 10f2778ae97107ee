"""A checkpoint held in memory: what `describe` and `BlockRunner` ask of one, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Info:
    dtype: torch.dtype
    shape: tuple[int, ...]


class MemoryCheckpoint:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = json.loads((path / "config.json").read_text())
        self.weights: dict[str, torch.Tensor] = {}
        for shard in sorted(path.glob("*.safetensors")):
            self.weights |= load_file(shard)

    @property
    def tensors(self) -> dict[str, Info]:
        return {k: Info(v.dtype, tuple(v.shape)) for k, v in self.weights.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name].clone()

    def read_rows(self, name: str, rows: int | slice) -> torch.Tensor:
        return self.weights[name][rows].clone()
