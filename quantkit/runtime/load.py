"""`quantkit.load`: a packed checkpoint (or an ordinary one) as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve
from quantkit.errors import InputRejected, QuantkitError
from quantkit.model.families import make_known
from quantkit.pack.scheme import METHOD, Scheme, from_json
from quantkit.runtime.site import prepare


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Load a checkpoint folder or Hub id as a transformers causal language model, ready to run.

    Packed linears run the exact arithmetic of their files; `dtype` is that of everything else
    (default: as stored). The folder is checked first: InputRejected when it is corrupt, unsafe
    or of an unknown family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantkit.runtime.huggingface import register

    register()
    path = resolve(source)
    checkpoint = open_checkpoint(path)
    make_known(checkpoint.config.get("model_type"))
    scheme = scheme_of(checkpoint)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if scheme is not None:
            config.quantization_config = scheme.to_json()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            device_map={"": torch.device(device)},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (QuantkitError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a configuration that fits nothing sets off
        raise InputRejected(
            f"{path}: transformers cannot load it: {type(error).__name__}: {error}",
            "config.json does not fit the weights",
        ) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random weights
        raise InputRejected(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
    if torch.device(device).type == "cuda":
        prepare(model, model.dtype)
    return model.eval()


def scheme_of(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme a checkpoint is packed with, by quantkit or compressed-tensors; None: not packed.

    InputRejected for other quantization methods.
    """
    from quantkit.export.compressed_tensors import check_method, read_config
    from quantkit.model.families import describe

    data = checkpoint.config.get("quantization_config")
    if not isinstance(data, dict):
        return None
    if data.get("quant_method") == METHOD:
        return from_json(data)
    check_method(data)  # first: other methods' tensors have shapes of their own
    return read_config(data, describe(checkpoint.config, checkpoint.tensors))
