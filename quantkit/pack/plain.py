"""Pack group by group on what is known already: every weight is rounded by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import torch
from torch import Tensor

from quantkit import console
from quantkit.calibrate.layerwise import choose_device
from quantkit.checkpoint.step import OpenStep
from quantkit.model.sites import Linear, Site, read_weight
from quantkit.pack.group import fused_groups, is_done, tensors_of_group, weights_of_group
from quantkit.pack.job import Job, PackOptions
from quantkit.pack.rounding import round_weight
from quantkit.pack.rtn import global_divisor
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors

Group = tuple[Site, SiteFormat, list[Linear]]  # linears that are rounded together


def pack_sites(step: OpenStep, job: Job, options: PackOptions) -> int:
    """Pack every site that has a format; returns the number of linears."""
    linears = 0
    device = choose_device(options.device)
    work: list[Group] = []
    for site in job.layout.sites:
        fmt = job.format(site)
        if fmt is None:
            continue
        linears += len(site.linears)
        for linear in site.linears:
            step.writer.drop(linear.tensor)
        groups = [g for g in fused_groups(site) if not is_done(step.writer, fmt, g)]
        work += [(site, fmt, group) for group in groups]
    with console.progress("pack", len(work)) as progress:
        for (site, fmt, group), stored in _read_ahead(job, work, device):
            found = packed_group(job, site, fmt, group, options, device, stored)
            step.writer.write_group(found)
            progress.advance(detail=site.key)
    for layer in range(job.layout.n_layers):
        sites = job.layout.layer_sites(layer)
        if any(s.expert is not None and job.format(s) for s in sites):
            for site in sites:
                if job.format(site) is None:
                    _unfuse(step, job, site)
    return linears


def _read_ahead(
    job: Job, work: Sequence[Group], device: torch.device
) -> Iterator[tuple[Group, list[Tensor] | None]]:
    """Each group with its weights, the next ones being read while a GPU works; None on a CPU."""

    def read(group: Group) -> list[Tensor]:
        return [read_weight(job.weights, linear) for linear in group[2]]

    if device.type == "cpu":
        yield from ((group, None) for group in work)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, work[0]) if work else None
        for group, following in zip_longest(work, work[1:]):
            assert coming is not None
            stored = coming.result()
            coming = pool.submit(read, following) if following else None
            yield group, stored


def packed_group(
    job: Job,
    site: Site,
    fmt: SiteFormat,
    group: Sequence[Linear],
    options: PackOptions,
    device: torch.device,
    stored: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a group by name, made on `device`; `stored`: its weights, when read before."""
    weights = weights_of_group(job, site, fmt, group, device, stored)
    importance = job.importance(site, fmt) if options.rounding == "search" else None
    if importance is not None:
        importance = importance.to(device)
    divisor = global_divisor([rest for rest, _ in weights]) if fmt.weights == "nvfp4" else None
    parts = []
    for _ in group:
        rest, columns = weights.pop(0)
        main = round_weight(
            rest,
            fmt,
            method=options.rounding or "rtn",
            hessian=importance,
            rule=job.scheme.scale_rule,
            divisor=divisor,
            four_over_six=options.four_over_six,
        )
        branch = {}
        if columns is not None:
            branch = branch_tensors(columns, job.channels[site.key], fmt)
        parts.append(main | branch)
    return tensors_of_group(job, site, fmt, group, parts)


def _unfuse(step: OpenStep, job: Job, site: Site) -> None:
    """Give a linear of a mixture that stays as it is a tensor of its own: experts are modules."""
    for linear in site.linears:
        name = f"{linear.module}.weight"
        if linear.expert is not None:
            step.writer.drop(linear.tensor)
            if not step.writer.done(name):
                step.writer.write(name, read_weight(job.weights, linear))
