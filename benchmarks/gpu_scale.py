"""An 8B model of random weights from calibration to packed on one GPU: time and memory by phase.

    python benchmarks/gpu_scale.py [--folder DIR] [--layers 32] [--samples 128] [--seq-len 2048]

Writes a Llama-3-8B shaped bfloat16 checkpoint (16 GB), then calibrates, separates outliers and
packs it (osc). Each phase is a process of its own, imports included. Prints one JSON object, and
with --profile what the time of the calibration of two blocks goes into.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_checkpoint import Model, build

LLAMA_8B = Model(hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256)


def phase(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run one command in a process of its own; gives its seconds and what it reports."""
    report = folder / "phase.json"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--phase", str(report), *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    found = {"seconds": round(seconds, 1)} | json.loads(report.read_text())
    print(arguments[0], found, file=sys.stderr, flush=True)
    return found


def in_child(report: Path, arguments: list[str]) -> None:
    """Run a quantkit command in this process and write what it took of both memories."""
    import torch

    from quantkit.checkpoint.step import peak_memory
    from quantkit.cli import main as quantkit

    code = 0
    try:
        quantkit(arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    found = {"host_gb": round(peak_memory() / 1e9, 2)}
    if torch.cuda.is_available():
        found["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        found["gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    report.write_text(json.dumps(found))
    sys.exit(code)


def profile(arguments: list[str]) -> None:
    """Run a command under Python's and torch's profilers; print the tops of both."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from quantkit.cli import main as quantkit

    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    python = cProfile.Profile()
    with torch_profile(activities=activities) as torch_side:
        python.enable()
        try:
            quantkit(arguments)
        except SystemExit as left:
            if left.code:
                raise
        python.disable()
    out = io.StringIO()
    pstats.Stats(python, stream=out).sort_stats("tottime").print_stats(30)
    print(out.getvalue())
    side = "device" if torch.cuda.is_available() else "cpu"
    rows = torch_side.key_averages()
    print(rows.table(sort_by=f"self_{side}_time_total", row_limit=30, max_name_column_width=90))


def main() -> None:
    """Build, run the phases, print."""
    if sys.argv[1:2] == ["--phase"]:
        in_child(Path(sys.argv[2]), sys.argv[3:])
    if sys.argv[1:2] == ["--profiled"]:
        profile(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, help="where to work (an empty folder is made there)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        start = time.monotonic()
        size = build(folder, LLAMA_8B, options.layers, (options.samples, options.seq_len))
        os.sync()  # the disk's own pace is not what is measured
        result: dict[str, Any] = {
            "gigabytes": round(size / 1e9, 2),
            "tokens": options.samples * options.seq_len,
            "build_seconds": round(time.monotonic() - start, 1),
        }
        data = ["--data", "tokens.safetensors:ids", "--samples", str(options.samples)]
        calibrate = ["calibrate", "model", *data, "--activation-memory", "16GB"]
        device = ["--device", options.device]
        print(result, file=sys.stderr, flush=True)
        result["calibrate"] = phase([*calibrate, *device], folder)
        result["separate-outliers"] = phase(["separate-outliers", "model-calibrated"], folder)
        pack = ["pack", "model-separated", "--scheme", "osc", *device]
        result["pack"] = phase(pack, folder)
        phases = [value for value in result.values() if isinstance(value, dict)]
        result["total_seconds"] = round(sum(found["seconds"] for found in phases), 1)
        result["gpu_gb"] = max(found.get("gpu_gb", 0) for found in phases)
        print(json.dumps(result, indent=1), flush=True)
        if options.profile:
            small = folder / "small"
            small.mkdir()
            build(small, LLAMA_8B, 2, (options.samples, options.seq_len))
            for arguments in (
                [*calibrate, *device, "-o", "c"],
                ["pack", "c", *pack[2:], "-o", "p"],
            ):
                command = [sys.executable, __file__, "--profiled", *arguments]
                subprocess.run(command, cwd=small, check=True)


if __name__ == "__main__":
    main()
