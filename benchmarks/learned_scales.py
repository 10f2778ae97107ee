"""How long learning one layer's smoothing scales takes: down_proj of an 8B model, 32k tokens.

    python benchmarks/learned_scales.py --device cuda

The inputs are synthetic (heavy-tailed products with a few loud channels, as after SwiGLU); the time
covers everything `quantkit smooth --method learned` does for the site: the joint search over
exponent and quantile, both starts, training, and every judgement on held tokens.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from quantkit.transforms.learned import Training, learn
from quantkit.transforms.scales import Problem, search
from quantkit.transforms.simulate import Simulation


def main() -> None:
    """Time each recipe and print one JSON object a line."""
    parser = argparse.ArgumentParser(description="Time learned smoothing scales.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--width", type=int, default=12288)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--recipes", default="int4:full,mxfp4:32,mxfp4:none")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--no-early-stop", action="store_true", help="take every step")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    x, w = synthetic(arguments.tokens, arguments.width, arguments.out, device)
    fitted = arguments.tokens * 4 // 5
    for recipe in arguments.recipes.split(","):
        rounding, _, size = recipe.partition(":")
        hadamard = arguments.width if size == "full" else int(size) if size.isdigit() else None
        problem = Problem(
            x[:fitted], x[fitted:], w, Simulation(rounding, rounding, hadamard=hadamard)
        )
        patience = arguments.steps if arguments.no_early_stop else Training().patience
        training = Training(steps=arguments.steps, batch=arguments.batch, patience=patience)
        clock(device)
        start = clock(device)
        found = search(problem)
        searched = clock(device)
        learned = learn(problem, {"one": None, "joint": found["joint"].scale}, training)
        ended = clock(device)
        row = {
            "recipe": recipe,
            "search_seconds": round(searched - start, 2),
            "learn_seconds": round(ended - searched, 2),
            "steps": learned.steps,
            "error_none": found["none"].error,
            "error_joint": found["joint"].error,
            "error_learned": learned.error,
        }
        if device.type == "cuda":
            row["gpu"] = torch.cuda.get_device_name(device)
            row["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 1)
        print(json.dumps(row), flush=True)


def synthetic(
    tokens: int, width: int, out: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [tokens, width] in bfloat16 and a weight [out, width] in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    size = torch.exp(0.8 * normal(width))
    size[torch.randperm(width, generator=generator, device=device)[:16]] *= 30
    parts = []
    for _ in range(0, tokens, 4096):
        gate = torch.nn.functional.silu(normal(4096, width))
        parts.append((gate * normal(4096, width) * size).bfloat16())
    return torch.cat(parts)[:tokens], 0.02 * normal(out, width)


def clock(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
