"""How long learned rounding takes on a layer stack of an 8B model: some layers, projected to all.

    python benchmarks/learned_rounding.py --device cuda

makes a checkpoint of a few decoder layers in the shapes of Qwen3-8B with random weights, calibrates
it on random tokens, and times everything `quantkit pack --rounding learned` does for its layers:
balancing, second moments, GPTQ, 200 steps of learning a block, and writing the files. Prints one
JSON object; `projected_minutes` is the time of one layer times the layers of the whole model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.checkpoint.step import Target
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack

VOCABULARY = 8192  # small: embedding and head are no part of what is timed


def main() -> None:
    """Make the checkpoint, calibrate, pack, print the times."""
    parser = argparse.ArgumentParser(description="Time learned rounding.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scheme", default="w4a4-plain")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--whole", type=int, default=36, help="layers of the whole model")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=12288)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        here = Path(folder)
        make_checkpoint(here / "model", options)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, VOCABULARY, (options.samples, options.seq_len), generator=generator)
        save_file({"ids": ids}, here / "tokens.safetensors")
        clock = time.monotonic()
        data = Options(
            f"{here / 'tokens.safetensors'}:ids", samples=options.samples, device=options.device
        )
        calibrate(here / "model", data, Target(here / "calibrated"))
        calibrated = time.monotonic() - clock
        times = {"calibrate": round(calibrated, 1)}
        for rounding in ("gptq", "learned"):
            steps = options.steps if rounding == "learned" else None
            packing = PackOptions(
                options.scheme, rounding=rounding, steps=steps, device=options.device
            )
            clock = time.monotonic()
            pack(here / "calibrated", packing, Target(here / rounding))
            times[rounding] = round(time.monotonic() - clock, 1)
            shutil.rmtree(here / rounding)
    device = options.device
    row = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "scheme": options.scheme,
        "layers": options.layers,
        "tokens": options.samples * options.seq_len,
        "steps": options.steps,
        "seconds": times,
        "seconds_per_layer": round(times["learned"] / options.layers, 2),
        "projected_minutes": round(times["learned"] / options.layers * options.whole / 60, 2),
    }
    print(json.dumps(row))


def make_checkpoint(path: Path, options: argparse.Namespace) -> None:
    """A qwen3 checkpoint with normal weights, bfloat16; drawn by a generator of its own."""
    path.mkdir()
    hidden, inner = options.hidden, options.intermediate
    head_dim = 128 if hidden >= 512 else hidden // options.heads
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, device=options.device)
        return (drawn * shape[-1] ** -0.5).bfloat16().cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    queries, keys = options.heads * head_dim, options.kv_heads * head_dim
    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden),
        "model.norm.weight": ones(hidden),
    }
    for layer in range(options.layers):
        at = f"model.layers.{layer}."
        tensors |= {
            f"{at}input_layernorm.weight": ones(hidden),
            f"{at}post_attention_layernorm.weight": ones(hidden),
            f"{at}self_attn.q_norm.weight": ones(head_dim),
            f"{at}self_attn.k_norm.weight": ones(head_dim),
            f"{at}self_attn.q_proj.weight": normal(queries, hidden),
            f"{at}self_attn.k_proj.weight": normal(keys, hidden),
            f"{at}self_attn.v_proj.weight": normal(keys, hidden),
            f"{at}self_attn.o_proj.weight": normal(hidden, queries),
            f"{at}mlp.gate_proj.weight": normal(inner, hidden),
            f"{at}mlp.up_proj.weight": normal(inner, hidden),
            f"{at}mlp.down_proj.weight": normal(hidden, inner),
        }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
