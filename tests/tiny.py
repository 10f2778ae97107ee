"""Tiny random models, built offline: one per family, saved as ordinary checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.model.families import make_known

VOCAB = 256


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config of `family`: 2 layers, hidden 64, 4 heads, 2 KV heads."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen3_moe":
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    make_known(family)
    return AutoConfig.for_model(family, **(common | changes))


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of `family` in float32; no global random state is touched."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # gains of one would hide a forgotten fusion
                parameter.data = 1 + 0.2 * torch.randn_like(parameter)
            elif name.endswith("bias"):
                parameter.data = 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_tiny(
    path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a tiny model and a byte-level tokenizer to `path`; returns `path`."""
    model = tiny_model(family, **changes).to(dtype)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes: no download, every text has an encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=alphabet[1], eos_token=alphabet[2]
    )


def calibrate_tiny(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny bfloat16 model with statistics: `folder/model` calibrated to `folder/calibrated`."""
    from safetensors.torch import save_file

    from quantkit.calibrate.layerwise import Options, calibrate
    from quantkit.checkpoint.step import Target

    dtype = changes.pop("dtype", torch.bfloat16)
    change = changes.pop("change", None)
    source = save_tiny(folder / "model", family, dtype, **changes)
    if change is not None:  # of the saved folder
        change(source)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (8, 64), generator=generator)
    save_file({"ids": ids}, folder / "tokens.safetensors")
    options = Options(f"{folder / 'tokens.safetensors'}:ids", samples=8, device="cpu")
    calibrate(source, options, Target(folder / "calibrated"))
    return folder / "calibrated"
