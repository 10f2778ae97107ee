"""The models of one evaluation: loaded when first needed, freed before the next one."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.workspace import user_cache

# Files beside the weights that change what a model computes.
CONFIGURATION = ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json")


class Subject:
    """A checkpoint under evaluation, and its model once something had to be computed."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.checkpoint, self.device = checkpoint, device
        self._model: Any = None
        self._identity: str | None = None

    @property
    def path(self) -> Path:
        """The folder of the checkpoint."""
        return self.checkpoint.path

    def model(self) -> Any:
        """The transformers model, in evaluation mode; loaded once."""
        if self._model is None:
            from transformers.utils import logging

            from quantkit.kernels import dispatch
            from quantkit.runtime.load import load

            logging.disable_progress_bar()
            dispatch.forget()  # what ran the model before this one
            self._model = load(self.path, device=self.device)
        return self._model

    def release(self) -> None:
        """Free the model's memory."""
        self._model = None
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def identity(self) -> str:
        """A digest of everything that decides this model's answers on this kind of device."""
        if self._identity is None:
            from quantkit.checkpoint.step import versions

            total = hashlib.sha256(self.checkpoint.weights_digest().encode())
            for name in CONFIGURATION:
                file = self.path / name
                total.update(file.read_bytes() if file.is_file() else b"-")
            total.update(json.dumps([versions(), self.device.split(":")[0]]).encode())
            self._identity = total.hexdigest()
        return self._identity

    def cache(self, name: str) -> Path:
        """A file of this subject in the user's cache."""
        return user_cache("evaluate") / self.identity()[:32] / name

    def kernels(self) -> dict[str, int]:
        """Kernel -> sites it ran; nothing for a model that was not loaded."""
        from quantkit.kernels import dispatch

        return dispatch.summary() if self._model is not None else {}


def choose_device(asked: str) -> str:
    """`auto`: the first CUDA device when there is one, else the CPU."""
    if asked != "auto":
        return asked
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
