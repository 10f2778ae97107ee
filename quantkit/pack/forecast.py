"""What packing takes: a few linears are rounded for trial, the rest follows in proportion."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from quantkit.calibrate.layerwise import choose_device
from quantkit.checkpoint.pace import digest_seconds, hash_rate, running, write_rate
from quantkit.checkpoint.step import peak_memory
from quantkit.pack.ends import rounded_rows, starts
from quantkit.pack.group import fused_groups
from quantkit.pack.job import Job, PackOptions
from quantkit.pack.plain import Group, packed_group
from quantkit.pack.rounding import FROM_INPUTS

TRIALS = 2  # the first one warms up
STATES_IN_MEMORY = 2 * 10**9  # hidden states beyond this go to a file


def forecast(
    job: Job, options: PackOptions, output: Path, packed: int, rest: int
) -> dict[str, Any]:
    """`peak_memory_bytes` and `seconds` of packing to `packed` bytes, `rest` bytes left alone.

    Rounding on text runs the model: no seconds then, and its memory is an estimate from shapes.
    """
    before = running()
    if options.rounding in FROM_INPUTS and options.dtype is None:
        return {"peak_memory_bytes": peak_memory() + _on_text(job)}
    seconds = before + digest_seconds(job.source)
    device = choose_device(options.device)
    for groups in _alike(job).values():
        site, fmt, group = groups[0]
        for _ in range(TRIALS):
            started = time.monotonic()
            for part in packed_group(job, site, fmt, group, options, device).values():
                part.cpu()
            spent = time.monotonic() - started
        seconds += spent * sum(map(_weights, groups)) / _weights(groups[0])
    for linear, end in job.scheme.ends(job.layout):
        for _ in range(TRIALS):
            started = time.monotonic()
            for part in rounded_rows(job, linear, end, 0, device).values():
                part.cpu()
            spent = time.monotonic() - started
        seconds += spent * linear.shape[0] / min(starts(linear).step, linear.shape[0])
    written = packed + _copied(job, rest)
    seconds += written * (1 / hash_rate() + 1 / write_rate(output))
    found = {"peak_memory_bytes": peak_memory(), "seconds": round(seconds, 1)}
    if device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _alike(job: Job) -> dict[tuple[str, str], list[Group]]:
    """All groups of linears, by kind of site and format."""
    found: dict[tuple[str, str], list[Group]] = {}
    for site in job.layout.sites:
        fmt = job.format(site)
        if fmt is not None:
            groups = [(site, fmt, group) for group in fused_groups(site)]
            found.setdefault((site.kind, fmt.words()), []).extend(groups)
    return found


def _weights(group: Group) -> int:
    return sum(linear.shape[0] * linear.shape[1] for linear in group[2])


def _copied(job: Job, rest: int) -> int:
    """Bytes left alone that share a shard with what is packed: they are written again."""
    tensors = job.source.tensors
    packed = {linear.tensor for linear in job.layout.linears()}
    packed |= {linear.tensor for linear, _ in job.scheme.ends(job.layout)}
    shards = {tensors[name].shard for name in packed}
    alone = [t for t in tensors.values() if t.name not in packed and t.shard not in shards]
    return rest - sum(info.nbytes for info in alone)


def _on_text(job: Job) -> int:
    """Two blocks, the second moments of a site three times over, and the states in memory."""
    blocks: dict[int, int] = {}
    for site in job.layout.sites:
        for linear in site.linears:
            size = linear.shape[0] * linear.shape[1]
            blocks[site.layer] = blocks.get(site.layer, 0) + size * 2
    widest = max(site.width + len(job.channels.get(site.key, ())) for site in job.layout.sites)
    return 2 * max(blocks.values()) + 3 * 4 * widest**2 + STATES_IN_MEMORY
