"""`diagnose`: where rounding loses accuracy, by site kind, layer, and role.

Sets of linears are rounded alone (DeltaAdd) and left out of a fully rounded model (DeltaRemove);
the two differ where errors interact, so both are given. All of it runs in one pass over the
blocks (sweep.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import console
from quantkit.checkpoint.ancestry import origin
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import open_source, peak_memory, versions
from quantkit.data.tokens import TokenBatch, load_tokens
from quantkit.diagnose.observe import Observations, Observer
from quantkit.diagnose.packing import rounder
from quantkit.diagnose.sets import Set, bits_of, layer_sets, role_sets
from quantkit.diagnose.sweep import Arrangement, Swept, histories, sweep
from quantkit.diagnose.switches import PLAIN, Noise
from quantkit.errors import InputRejected, QuantkitError, UsageError
from quantkit.evaluate.models import choose_device
from quantkit.evaluate.perplexity import Excess, compare, summarise
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import KINDS
from quantkit.model.timing import ROUNDED, pace
from quantkit.pack.job import Job, PackOptions, prepare

SIGMAS = (0.01, 0.03, 0.1, 0.3)
STATE_MEMORY = 4 * 10**9  # hidden states carried at once; more sets go through in several passes

# Schemes the Pareto picture shows beside the one diagnosed: name, options.
SCHEMES: tuple[tuple[str, PackOptions], ...] = (
    ("mxfp4", PackOptions("mxfp4")),
    ("mxfp4, Hadamard 32", PackOptions("mxfp4", hadamard=32)),
    ("nvfp4", PackOptions("nvfp4")),
    ("mxfp8", PackOptions("mxfp8")),
    ("osc", PackOptions("osc")),
    ("osc, mlp_out mxfp4", PackOptions("osc", mlp_out="mxfp4")),
    ("nvfp4 + fp8 branch", PackOptions("w4a4", rounding="rtn")),
)


@dataclass(frozen=True)
class Options:
    """What to diagnose and how thoroughly; `quick` leaves single layers out and looks at less."""

    scheme: PackOptions = field(default_factory=lambda: PackOptions("mxfp4"))
    data: str = "sample"
    windows: int = 16
    seq_len: int | None = None
    noise_windows: int = 4
    quick: bool = False
    compare: tuple[str, ...] = ()
    device: str = "auto"
    seed: int = 0


def diagnose(checkpoint: str | Path | None, options: Options) -> dict[str, Any]:
    """Diagnose a checkpoint; everything found as one JSON-ready object (page.py draws it).

    A packed checkpoint stands for the one it was made from. Raises InputRejected and UsageError.
    """
    source = unpacked(open_source(checkpoint))
    tokens = _tokens(source, options)
    layout = describe(source.config, source.tensors)
    device = torch.device(choose_device(options.device))
    runner = BlockRunner(source, layout, device=device)
    runner.keep_head = True
    jobs = _jobs(source, options)
    main = jobs[options.scheme.scheme]
    sets = role_sets(layout) if options.quick else role_sets(layout) + layer_sets(layout)
    arrangements = _arrangements(sets, options.scheme.scheme, jobs)
    windows = min(options.noise_windows, 2 if options.quick else options.noise_windows)
    observer = Observer(runner, list(jobs), windows)
    swept = _sweep(runner, tokens, arrangements, jobs, observer)
    noise = _noise(runner, tokens.ids[:windows], observer.found, swept)
    report = {
        "checkpoint": str(source.path),
        "scheme": options.scheme.record(),
        "data": tokens.description,
        "windows": len(tokens.ids),
        "seq_len": tokens.ids.shape[1],
        "device": str(device),
        "kernel": "reference",  # the sites are simulated with the packed arithmetic in torch
        "layers": layout.n_layers,
        "plain": summarise(swept.losses["plain"]).as_dict(),
        "rounded": _excess(compare(swept.losses["plain"], swept.losses["all"])),
        "sets": [_set(s, swept, layout, main) for s in sets],
        "pareto": _pareto(sets, swept, jobs, options.scheme.scheme),
        "noise": noise,
        "sites": [view.as_dict(raster=True) for view in observer.found.views.values()],
        "local_error": observer.found.local_error,
        "drift": swept.drift,
        "compared": [_compared(other, options, tokens) for other in _others(source, options)],
        "versions": versions(),
        "seed": options.seed,
    }
    return report


def _tokens(source: Checkpoint, options: Options) -> TokenBatch:
    tokens = load_tokens(
        options.data,
        source.path,
        samples=options.windows,
        seq_len=options.seq_len,
        seed=options.seed,
        held_out=True,
    )
    console.note(f"text: {tokens.description}")
    return tokens


def dry_run(checkpoint: str | Path | None, options: Options) -> dict[str, Any]:
    """What `diagnose` would run and hold in memory; no block is read."""
    source = unpacked(open_source(checkpoint))
    tokens = _tokens(source, options)
    layout = describe(source.config, source.tensors)
    jobs = _jobs(source, options)
    sets = role_sets(layout) if options.quick else role_sets(layout) + layer_sets(layout)
    arrangements = _arrangements(sets, options.scheme.scheme, jobs)
    runs = [len(set(at.values())) for at in histories(layout, arrangements)]
    state = tokens.ids.numel() * layout.hidden * 2
    block = sum(t.nbytes for t in source.tensors.values()) // layout.n_layers
    runner = BlockRunner(source, layout, device=choose_device(options.device))
    measured = pace(runner, tokens.ids[:1])
    windows = len(tokens.ids)
    seconds = windows * (ROUNDED * measured.block * sum(runs) + measured.head * len(arrangements))
    noise = min(options.noise_windows, 2 if options.quick else windows)
    seconds += noise * len(SIGMAS) * len(KINDS) * measured.whole(layout.n_layers)
    seconds += noise * ROUNDED * measured.block * layout.n_layers * len(jobs)
    return {
        "checkpoint": str(source.path),
        "data": tokens.description,
        "sets": len(sets),
        "schemes": list(jobs),
        "block_passes": sum(runs),
        "whole_passes": sum(runs) / layout.n_layers,
        "passes_if_run_apart": len(arrangements),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory()
        + min(max(runs) * state, STATE_MEMORY)
        + (2 + len(jobs)) * block,
    }


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or the unquantized one it was packed from; InputRejected without that."""
    if "quantization_config" not in checkpoint.config:
        return checkpoint
    found = origin(checkpoint)
    if found is None or "quantization_config" in found.config:
        raise InputRejected(
            f"{checkpoint.path} is packed, and the checkpoint it was made from is not here",
            "name the unquantized checkpoint",
        )
    console.note(f"{checkpoint.path} is packed: diagnosing {found.path}, which it was made from")
    return found


def _jobs(source: Checkpoint, options: Options) -> dict[str, Job]:
    """The scheme diagnosed and those of the picture, as far as this checkpoint allows them."""
    jobs = {options.scheme.scheme: prepare(source, options.scheme)}
    for name, packing in SCHEMES:
        if name in jobs:
            continue
        try:
            jobs[name] = prepare(source, packing)
        except QuantkitError as error:
            console.note(f"{name} is left out: {error.message}; calibrate first to see it")
    return jobs


def _arrangements(
    sets: Sequence[Set], mode: str, jobs: Mapping[str, Job]
) -> dict[str, Arrangement]:
    found: dict[str, Arrangement] = {"plain": lambda site: PLAIN}
    found["all"] = lambda site: mode
    for each in sets:
        found[f"add {each.name}"] = _only(each, mode)
        found[f"remove {each.name}"] = _all_but(each, mode)
    for name in jobs:
        found[f"scheme {name}"] = _everywhere(name)
    return found


def _only(chosen: Set, mode: str) -> Arrangement:
    return lambda site: mode if site.key in chosen.keys else PLAIN


def _all_but(chosen: Set, mode: str) -> Arrangement:
    return lambda site: PLAIN if site.key in chosen.keys else mode


def _everywhere(mode: str) -> Arrangement:
    return lambda site: mode


def _sweep(
    runner: BlockRunner,
    tokens: TokenBatch,
    arrangements: Mapping[str, Arrangement],
    jobs: Mapping[str, Job],
    observer: Observer,
) -> Swept:
    """All arrangements, in as many passes as their hidden states need memory."""
    size = tokens.ids.numel() * runner.layout.hidden * runner.dtype.itemsize
    room = max(4, STATE_MEMORY // size)
    names = [n for n in arrangements if n not in ("plain", "all")]
    losses: dict[str, Tensor] = {}
    drift: dict[str, list[float]] = {}
    ran, first = 0, True
    for start in range(0, max(len(names), 1), room):
        part = {n: arrangements[n] for n in names[start : start + room]}
        if first:
            part |= {n: arrangements[n] for n in ("plain", "all")}
        schemes = [f"scheme {name}" for name in jobs] if first else []
        swept = sweep(
            runner,
            tokens.ids,
            part,
            rounder(jobs),
            observe=observer if first else None,
            drift_of=[n for n in schemes if n in part],
        )
        losses |= swept.losses
        drift |= {n.removeprefix("scheme "): d for n, d in swept.drift.items()}
        ran, first = ran + swept.blocks_run, False
    return Swept(losses, drift, ran)


def _noise(
    runner: BlockRunner, tokens: Tensor, seen: Observations, swept: Swept
) -> list[dict[str, Any]]:
    """Loss against the size of Gaussian noise at one kind of site, and the slope on log scales."""
    plans: dict[str, Arrangement] = {}
    for kind in KINDS:
        for sigma in SIGMAS:
            plans[f"{kind} {sigma}"] = _noisy(kind, Noise(sigma))
    found = sweep(runner, tokens, plans, rounder({}), spreads=seen.spreads, label="noise")
    plain = swept.losses["plain"][: len(tokens)]
    curves = []
    for kind in KINDS:
        points: list[dict[str, Any]] = []
        for sigma in SIGMAS:
            excess = compare(plain, found.losses[f"{kind} {sigma}"])
            points.append({"sigma": sigma, **_excess(excess)})
        curves.append({"kind": kind, "points": points, "slope": slope(points)})
    return curves


def _noisy(kind: str, mode: Noise) -> Arrangement:
    return lambda site: mode if site.kind == kind else PLAIN


def slope(points: Sequence[Mapping[str, Any]]) -> float | None:
    """Least-squares slope of log(excess) over log(sigma); 2 is what the second order predicts.

    Points that do not stand out of their error (two standard errors) are left out; None when
    fewer than two are left.
    """
    kept = [
        (math.log(p["sigma"]), math.log(p["excess_nll"]))
        for p in points
        if p["excess_nll"] > 2 * (p["stderr"] or 0) and p["excess_nll"] > 0
    ]
    if len(kept) < 2:
        return None
    mx, my = (sum(column) / len(kept) for column in zip(*kept, strict=True))
    over = sum((x - mx) * (y - my) for x, y in kept)
    return over / sum((x - mx) ** 2 for x, _ in kept)


def _set(each: Set, swept: Swept, layout: Any, job: Job) -> dict[str, Any]:
    plain, whole = swept.losses["plain"], swept.losses["all"]
    removed, added = swept.losses[f"remove {each.name}"], swept.losses[f"add {each.name}"]
    gain = compare(removed, whole)
    extra = bits_of(layout, job, left_out=each.keys) - bits_of(layout, job)
    return {
        "name": each.name,
        "group": each.group,
        "add": _excess(compare(plain, added)),
        "remove": _excess(gain),
        "extra_bits": extra,
        "nats_per_bit": gain.mean / extra if extra else None,
    }


def _pareto(
    sets: Sequence[Set], swept: Swept, jobs: Mapping[str, Job], main: str
) -> list[dict[str, Any]]:
    """True bits per weight against excess loss: every scheme, and the main one with a kind left."""
    plain = swept.losses["plain"]
    points: list[dict[str, Any]] = []
    for name, job in jobs.items():
        excess = compare(plain, swept.losses[f"scheme {name}"])
        points.append({"name": name, "bits": bits_of(job.layout, job), **_excess(excess)})
    for each in sets:
        if each.group == "kind":
            excess = compare(plain, swept.losses[f"remove {each.name}"])
            bits = bits_of(jobs[main].layout, jobs[main], left_out=each.keys)
            points.append({"name": f"{main}, {each.name} bf16", "bits": bits, **_excess(excess)})
    for point in points:
        point["frontier"] = not any(
            other["bits"] <= point["bits"] and other["excess_nll"] < point["excess_nll"]
            for other in points
        )
    return sorted(points, key=lambda p: p["bits"])


def _excess(excess: Excess) -> dict[str, float | None]:
    return {"excess_nll": excess.mean, "stderr": excess.stderr}


def _others(source: Checkpoint, options: Options) -> list[Checkpoint]:
    """Checkpoints to compare the blocks' errors with: those named, and the untransformed one."""
    found = [unpacked(open_source(name)) for name in options.compare]
    transformed = any(
        step.verb in ("smooth", "rotate")
        for step in (source.manifest.steps if source.manifest else [])
    )
    if transformed and not found and (before := origin(source)) is not None:
        found.append(before)
    return found


def _compared(other: Checkpoint, options: Options, tokens: TokenBatch) -> dict[str, Any]:
    """Another checkpoint's views and block errors under the same scheme: before a transform."""
    layout = describe(other.config, other.tensors)
    runner = BlockRunner(other, layout, device=choose_device(options.device))
    mode = options.scheme.scheme
    jobs = {mode: prepare(other, options.scheme)}
    observer = Observer(runner, [mode], options.noise_windows)
    if int(tokens.ids.max()) >= layout.vocab:
        raise UsageError(f"{other.path} has another vocabulary")
    plans: dict[str, Arrangement] = {"plain": lambda site: PLAIN, "all": _everywhere(mode)}
    few = tokens.ids[: options.noise_windows]
    swept = sweep(runner, few, plans, rounder(jobs), observe=observer, label=other.path.name)
    return {
        "checkpoint": str(other.path),
        "rounded": _excess(compare(swept.losses["plain"], swept.losses["all"])),
        "sites": [view.as_dict(raster=False) for view in observer.found.views.values()],
        "local_error": observer.found.local_error,
    }
