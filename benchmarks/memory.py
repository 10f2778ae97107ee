"""Peak memory of each step on a random checkpoint larger than it should ever hold.

    python benchmarks/memory.py [--gigabytes 4] [--steps calibrate pack] [--keep FOLDER]

Builds a llama-shaped checkpoint in shards, runs every step in a process of its own and prints the
peak resident memory, and how much of it is above an interpreter that only imported torch.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 8192, 16, 16, 32000
SHARD = 10**9
STEPS = {
    "calibrate": ["calibrate", "model", "--data", "tokens.safetensors:ids", "--device", "cpu"],
    "separate-outliers": ["separate-outliers"],
    "pack": ["pack", "--scheme", "osc"],
    "pack mxfp4": ["pack", "model", "--scheme", "mxfp4"],
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama with `layers` blocks."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    kv = HIDDEN // HEADS * KV_HEADS
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": (kv, HIDDEN),
            f"{at}self_attn.v_proj.weight": (kv, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor."""
    count = 2
    for length in shape:
        count *= length
    return count


def build(folder: Path, gigabytes: float) -> None:
    """Write the checkpoint and a file of random token ids, one tensor in memory at a time."""
    import torch
    from safetensors.torch import save_file

    layers = 1
    while sum(map(size_of, shapes(layers + 1).values())) <= gigabytes * 10**9:
        layers += 1
    model = folder / "model"
    model.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers).items():
        if shards[-1] and sum(map(size_of, shards[-1].values())) + size_of(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, shape in shard.items():
            end = position + size_of(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position, weight_map[name] = end, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(model / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for shape in shard.values():
                if len(shape) == 1:
                    tensor = torch.ones(shape)
                else:
                    tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
                out.write(tensor.bfloat16().view(torch.uint8).numpy().tobytes())
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (model / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, VOCAB, (64, 512), generator=generator)
    save_file({"ids": ids}, folder / "tokens.safetensors")


def peak(command: list[str], folder: Path) -> tuple[int, float]:
    """Run a command; gives its peak resident bytes and its seconds."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss * 1024, time.monotonic() - start


def main() -> None:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--keep", type=Path, help="use this folder and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        if not (folder / "tokens.safetensors").exists():
            # In a process of its own: what this one holds would count as its children's.
            code = f"import memory, pathlib; memory.build(pathlib.Path({str(folder)!r}), "
            path = {"PYTHONPATH": str(Path(__file__).parent)}
            subprocess.run(
                [sys.executable, "-c", f"{code}{options.gigabytes})"],
                check=True,
                env=os.environ | path,
            )
        torch_alone, _ = peak([sys.executable, "-c", "import torch"], folder)
        weights = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
        print(f"checkpoint {weights / 1e9:.2f} GB; torch imported {torch_alone / 1e6:.0f} MB")
        print(f"{'step':20s} {'peak MB':>8s} {'above MB':>9s} {'seconds':>8s}")
        for step in options.steps:
            command = [sys.executable, "-m", "quantkit", *STEPS[step], "--overwrite"]
            if step == "calibrate":
                command += ["--samples", str(options.samples)]
            most, seconds = peak(command, folder)
            above = most - torch_alone
            print(f"{step:20s} {most / 1e6:8.0f} {above / 1e6:9.0f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
