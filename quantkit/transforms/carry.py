"""Statistics across a transform: rescaled exactly where it is diagonal, dropped where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from safetensors.torch import save
from torch import Tensor

from quantkit import console
from quantkit.calibrate import store
from quantkit.calibrate.accumulators import GROUPS
from quantkit.calibrate.layerwise import ALPHA
from quantkit.checkpoint.step import OpenStep

# How a statistic of x becomes that of x / s: the power of 1/s it is multiplied by.
POWERS = {"mean": 1, "abs_mean": 1, "absmax": 1, "tail": 1, "energy": 2, "m2": 2, "m3": 3, "m4": 4}


def carry_statistics(
    step: OpenStep,
    scales: Mapping[str, Tensor],
    dropped: Set[str] = frozenset(),
    counts: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> str | None:
    """Write the statistics of the step's output; returns their digest, None without statistics.

    Sites in `scales` had their channels divided by s [width]: moments, sums, maxima and tails
    follow exactly; the counts of group maxima (hits, qualify) cannot, and are taken from `counts`
    (see `counted`) or left out. Sites in `dropped` changed in another way and lose everything.
    Call it when every tensor is written.
    """
    counts = counts or {}
    plan = step.source.path / "outliers.json"
    if plan.exists():
        console.warn(
            "the plan of separated channels was made for the weights before this step and is "
            "left out: calibrate and separate-outliers again"
        )
    if not (step.source.path / store.FILE).exists():
        return None
    statistics = store.load_statistics(step.source)
    parts = []
    for i, key in enumerate(statistics.keys()):
        if key in dropped:
            continue
        names = [name for name in statistics.tensors if name.rpartition("/")[0] == key]
        found = {name: statistics.get(key, name.rpartition("/")[2]) for name in names}
        if key in scales:
            found = rescaled(found, scales[key])
            found |= {f"{key}/{name}": tensor for name, tensor in counts.get(key, {}).items()}
        part = step.writer.scratch / f"carried-{i:05d}.safetensors"
        part.write_bytes(save({name: t.contiguous() for name, t in found.items()}))
        parts.append(part)
    if not parts:
        console.note("statistics: every site changed, none are kept; calibrate again for more")
        return None
    changed = set(scales) & set(statistics.keys())
    without = changed - set(counts)
    meta = dict(statistics.meta) | {
        "weights_digest": step.writer.weights_digest(),
        "carried": {"rescaled": len(changed), "recounted": len(changed - without)}
        | {"dropped": len(dropped)},
    }
    step.writer.write_file(store.FILE, store.combine(parts, meta))
    if changed:
        console.note(f"statistics: rescaled exactly for {len(changed)} sites")
    if changed - without:
        console.note("their counts of group maxima are new, from the tokens this step ran")
    if without:
        console.note(
            f"the counts of group maxima of {len(without)} sites cannot be rescaled and are left "
            "out: calibrate again before separating outliers"
        )
    if dropped:
        console.note(f"statistics: dropped for {len(dropped)} sites whose inputs were rotated")
    return store.open_statistics(step.writer.side_file(store.FILE)).digest


def counted(x: Tensor) -> dict[str, Tensor]:
    """`hits` and `qualify` of inputs x [tokens, width] for every group size, as calibration counts.

    How often a channel was the maximum of its group and above five times the mean |x|.
    """
    magnitude = x.abs().float()
    threshold = ALPHA * float(magnitude.mean(dtype=torch.float64))
    found = {}
    for group in GROUPS:
        blocks = torch.nn.functional.pad(magnitude, (0, -x.shape[1] % group)).unflatten(
            -1, (-1, group)
        )
        top, place = blocks.max(-1)
        channel = place + torch.arange(blocks.shape[1], device=x.device) * group
        above = top > threshold
        hits = torch.bincount(channel[above], minlength=blocks.shape[1] * group)
        found[f"hits{group}"] = hits[: x.shape[1]].cpu()
        found[f"qualify{group}"] = above.sum(0).cpu()
    return found


def rescaled(found: Mapping[str, Tensor], s: Tensor) -> dict[str, Tensor]:
    """The statistics `<key>/<name>` of x / s from those of x; what cannot follow is left out."""
    out = {}
    for name, tensor in found.items():
        kind = name.rpartition("/")[2]
        if kind == "count":
            out[name] = tensor
        elif kind in POWERS:
            factor = s.double() ** -POWERS[kind]
            wide = tensor.double() * (factor[:, None] if tensor.dim() == 2 else factor)
            out[name] = wide.to(tensor.dtype if tensor.itemsize > 2 else s.dtype)
    return out
