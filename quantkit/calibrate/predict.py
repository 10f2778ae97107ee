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
from quantkit.checkpoint.step import Target, open_source, output_of, peak_memory
from quantkit.model.block import BlockRunner


def predict(checkpoint: str | Path | None, options: Options, target: Target) -> dict[str, Any]:
    """Predict memory, time and bytes of a calibration; writes nothing.

    Time and memory are measured on the first block with one batch: the other blocks and batches
    cost the same again in time; in memory only the states and group maxima of all batches add up.
    """
    start = time.monotonic()
    source = open_source(checkpoint)
    output = output_of(source, "calibrated", target)
    run = prepare(source, options, Ranks())
    runner = BlockRunner(source, run.layout, device=run.device, dtype=run.dtype)
    runner.prefetch(0)
    first, last = run.batches[0]
    hidden = runner.embed(run.tokens.ids[first:last])
    ready = time.monotonic()
    block = runner.load(0)
    if run.layout.n_layers > 1:
        runner.prefetch(1)
    found: dict[str, SiteAccumulator] = {}
    scratch = Scratch()
    loaded = time.monotonic()
    run.one_batch(runner, block, 0, hidden, found, scratch)  # once to warm up
    warm = time.monotonic()
    run.one_batch(runner, block, 0, hidden, found, scratch)
    batch_seconds = time.monotonic() - warm
    keys = sum(k.nbytes for acc in found.values() for k in acc.maxima.keys) // 2
    closing = time.monotonic()
    run.measured(0, found)
    closed = time.monotonic()

    batches = len(run.batches)
    tokens = run.tokens.ids.numel()
    states = tokens * run.layout.hidden * run.dtype.itemsize
    held = states if states <= options.activation_memory else 0
    block_seconds = (loaded - ready) / 2 + batches * batch_seconds + (closed - closing)
    seconds = (ready - start) + run.layout.n_layers * block_seconds
    per_channel = 4 + 8 * 9 + run.k * run.dtype.itemsize
    channels = sum(site.width for site in run.layout.sites)
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
        "bytes_written": channels * per_channel,
        "peak_memory_bytes": peak_memory() + held + (batches - 1) * keys,
        "seconds": round(seconds, 1),
    }
    if run.device.type == "cuda":
        plan["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(run.device)
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
