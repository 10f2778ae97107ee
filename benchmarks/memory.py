"""Peak memory of calibrate and pack on a random 4 GB checkpoint, which must stay under a bound.

    python benchmarks/memory.py [--gigabytes 4] [--bound 1.5] [--folder DIR]

Memory is a step's peak resident set less that of an interpreter that only imported torch. Exits
with 1 when a step takes more than `--bound` GB. `scale.py` shows how memory and time grow.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import Model
from scale import run

MODEL = Model(hidden=2048, intermediate=8192, heads=16, kv_heads=16, vocab=32000)
WINDOWS = (32, 512)
STEPS = (
    ["calibrate", "model", "--data", "tokens.safetensors:ids", "--seq-len", "512"],
    ["separate-outliers", "model-calibrated"],
    ["pack", "model-separated", "--scheme", "osc"],
    ["pack", "model", "--scheme", "mxfp4"],
)


def main() -> None:
    """Build, run every step in a process of its own, print, and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--bound", type=float, default=1.5, help="GB above torch alone")
    parser.add_argument("--folder", type=Path, help="where to work (an empty folder is made there)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        code = (  # in a process of its own: what this one holds would count as its children's
            "import pathlib, random_checkpoint as r; "
            f"r.build(pathlib.Path({temporary!r}), r.{MODEL!r}, "
            f"{MODEL.layers(options.gigabytes)}, {WINDOWS})"
        )
        path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        subprocess.run(
            [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}
        )
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        _, alone, *_ = run([sys.executable, "-c", "import torch"], folder)
        print(f"checkpoint of {size / 1e9:.2f} GB; an interpreter with torch: {alone / 1e6:.0f} MB")
        above = []
        for step in STEPS:
            command = [sys.executable, "-m", "quantkit", *step, "-q"]
            _, most, seconds, _ = run(command, folder)
            above.append(most - alone)
            shown = f"{above[-1] / 1e6:.0f} MB above that, {seconds:.0f} s"
            print(f"{' '.join(step):75s} {shown}", flush=True)
    if max(above) > options.bound * 1e9:
        raise SystemExit(f"more than {options.bound} GB")


if __name__ == "__main__":
    main()
