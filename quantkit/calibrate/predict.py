"""`calibrate --dry-run`: what a run would take, from one batch through the first block."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from quantkit import console
from quantkit.calibrate.accumulators import Scratch, SiteAccumulator
from quantkit.calibrate.layerwise import Options, prepare
from quantkit.calibrate.parallel import Ranks
from quantkit.checkpoint.pace import digest_seconds, hash_rate, running, write_rate
from quantkit.checkpoint.step import Target, open_source, output_of, peak_memory
from quantkit.model.block import BlockRunner


def predict(checkpoint: str | Path | None, options: Options, target: Target) -> dict[str, Any]:
    """Predict memory, time and bytes of a calibration; leaves nothing behind.

    One batch runs through the first two blocks as in a real run, the next block being read
    meanwhile. The other blocks and batches cost the same again in time; in memory only the states
    and group maxima of all batches add up.
    """
    source = open_source(checkpoint)
    output = output_of(source, "calibrated", target)
    run = prepare(source, options, Ranks())
    runner = BlockRunner(source, run.layout, device=run.device, dtype=run.dtype)
    runner.prefetch(0)
    first, last = run.batches[0]
    started = time.monotonic()
    hidden = runner.embed(run.tokens.ids[first:last])
    embed_seconds = time.monotonic() - started
    before, layers = running(), run.layout.n_layers
    for i in range(min(layers, 2)):  # the first one warms up
        started = time.monotonic()
        block = runner.load(i)
        if i + 1 < layers:
            runner.prefetch(i + 1)
        found: dict[str, SiteAccumulator] = {}
        batch = time.monotonic()
        hidden = run.one_batch(runner, block, i, hidden, found, Scratch())
        batch_seconds = time.monotonic() - batch
        del block
        keys = sum(k.nbytes for acc in found.values() for k in acc.maxima.keys)
        run.measured(i, found)
        block_seconds = time.monotonic() - started

    batches, on_gpu = len(run.batches), run.device.type == "cuda"
    per_batch = batch_seconds * (run.tokens.ids.shape[0] / (last - first) - 1)
    per_channel = 4 + 8 * 9 + run.k * run.dtype.itemsize
    written = sum(site.width for site in run.layout.sites) * per_channel
    # Once a block's and once all together, then read back for their digest.
    writing = written * (2 / write_rate(output) + 1 / hash_rate())
    seconds = before + digest_seconds(source) + embed_seconds * (batches - 1)
    seconds += layers * (block_seconds + per_batch) + writing
    tokens = run.tokens.ids.numel()
    states = tokens * run.layout.hidden * run.dtype.itemsize
    held = states if states <= options.activation_memory else 0
    read = sum(info.nbytes for info in source.tensors.values())
    plan = {
        "output": str(output),
        "data": run.tokens.description,
        "layers": run.layout.n_layers,
        "sites": len(run.layout.sites),
        "linears": len(run.layout.linears()),
        "unmatched_tensors": list(run.layout.unmatched),
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "bytes_read": read,
        "bytes_written": written,
        "peak_memory_bytes": peak_memory() + held + (0 if on_gpu else (batches - 1) * keys),
        "seconds": round(seconds, 1),
    }
    if on_gpu:
        most = torch.cuda.max_memory_allocated(run.device)
        plan["peak_gpu_bytes"] = most + (batches - 1) * keys
    return plan


def describe_plan(plan: dict[str, Any]) -> str:
    """The plan as text."""
    rows = [(name.replace("_", " "), _shown(name, value)) for name, value in plan.items()]
    return console.table(("calibrate would", ""), rows)


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes") or name.startswith("bytes_"):
        return f"{value / 1e6:,.0f} MB"
    if name == "seconds":
        return f"{value:,.0f} s"
    return f"{len(value)}" if isinstance(value, list) else str(value)
