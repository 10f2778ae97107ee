"""A pickled checkpoint as safetensors, read by torch's loader for plain tensors only.

`torch.load(weights_only=True)` builds tensors and containers and refuses every other object, so no
code of the file runs; the memory map keeps what was not yet written out of memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import INDEX, SINGLE, Checkpoint
from quantkit.checkpoint.safety import inside, plain_name, read_json
from quantkit.checkpoint.step import Target, versions
from quantkit.checkpoint.workspace import default_output, record_output
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import InputRejected, UsageError

PICKLED_SINGLE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def convert(folder: Path, target: Target) -> Path:
    """Write the pickled weights of `folder` as a safetensors checkpoint; returns the output.

    Tensors that share their memory with an earlier one (a tied head) are left out when config.json
    ties them. Raises InputRejected when a file holds anything but tensors, UsageError when the
    checkpoint is safetensors already.
    """
    if not folder.is_dir():
        raise InputRejected(f"{folder}: no such folder", "give the folder of a checkpoint")
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        raise UsageError(f"{folder}: has safetensors already", "there is nothing to convert")
    config = read_json(inside(folder, "config.json"))
    if not isinstance(config, dict):
        raise InputRejected(f"{folder / 'config.json'}: not a JSON object")
    files = _files(folder)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    source = Checkpoint(folder, config, {}, None, {})
    output = target.output or default_output(folder, "safetensors")
    fingerprint = {"verb": "convert", "input": digest.hexdigest(), "versions": versions()}
    with CheckpointWriter(
        output,
        source,
        fingerprint=fingerprint,
        overwrite=target.overwrite,
        restart=target.restart,
        max_shard_size=target.max_shard_size,
    ) as writer:
        tied = config.get("tie_word_embeddings", True) is True
        for name, tensor in _tensors(files, skip_shared=tied):
            writer.write(name, tensor)
        done = writer.finish(Step("convert", versions=versions(), input_digest=digest.hexdigest()))
    record_output(Path.cwd(), done)
    return done


def _files(folder: Path) -> list[Path]:
    if (folder / PICKLED_INDEX).exists():
        data = read_json(inside(folder, PICKLED_INDEX))
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(weight_map, dict):
            raise InputRejected(f"{folder / PICKLED_INDEX}: no weight_map")
        names = sorted({plain_name(n, folder / PICKLED_INDEX) for n in weight_map.values()})
        return [inside(folder, name) for name in names]
    if (folder / PICKLED_SINGLE).exists():
        return [inside(folder, PICKLED_SINGLE)]
    raise InputRejected(f"{folder}: no {PICKLED_SINGLE} and no {PICKLED_INDEX}")


def _tensors(files: list[Path], *, skip_shared: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle fails anywhere in the loader
            if "mmap" in str(error):  # the format before torch 1.6 cannot be mapped
                state = _load_whole(file)
            else:
                raise _refused(file) from None
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
        ):
            raise _refused(file)
        seen: set[tuple[int, int, tuple[int, ...]]] = set()
        for name, tensor in state.items():
            key = (tensor.data_ptr(), tensor.numel(), tuple(tensor.shape))
            if skip_shared and tensor.numel() and key in seen:
                continue
            seen.add(key)
            yield name, tensor


def _load_whole(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:
        raise _refused(file) from None


def _refused(file: Path) -> InputRejected:
    return InputRejected(
        f"{file}: not a plain dictionary of tensors",
        "it is damaged, or holds objects that only code of its own could read",
    )
