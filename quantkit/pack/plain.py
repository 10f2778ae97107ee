"""Pack group by group on what is known already: every weight is rounded by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, zip_longest

import torch
from safetensors.torch import load, save
from torch import Tensor

from quantkit import console
from quantkit.calibrate.layerwise import choose_device
from quantkit.calibrate.parallel import Ranks
from quantkit.checkpoint.step import OpenStep
from quantkit.model.sites import Linear, Site, read_weight
from quantkit.pack.group import fused_groups, is_done, tensors_of_group, weights_of_group
from quantkit.pack.job import Job, PackOptions
from quantkit.pack.rounding import round_weight
from quantkit.pack.rtn import global_divisor
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors

Group = tuple[Site, SiteFormat, list[Linear]]  # linears that are rounded together


def pack_sites(step: OpenStep, job: Job, options: PackOptions, ranks: Ranks) -> int:
    """Pack every site that has a format; returns the number of linears."""
    work = _groups(job)
    for _, _, group in work:
        for linear in group:
            step.writer.drop(linear.tensor)
    left = [i for i, (_, fmt, group) in enumerate(work) if not is_done(step.writer, fmt, group)]
    ranks.broadcast(left)
    with console.progress("pack", len(left)) as progress:
        for tensors in _packed([work[i] for i in left], job, options, ranks):
            step.writer.write_group(tensors)
            del tensors  # before the next ones are made
            progress.advance()
    for layer in range(job.layout.n_layers):
        sites = job.layout.layer_sites(layer)
        if any(s.expert is not None and job.format(s) for s in sites):
            for site in sites:
                if job.format(site) is None:
                    _unfuse(step, job, site)
    return sum(len(group) for _, _, group in work)


def help_packing(job: Job, options: PackOptions, ranks: Ranks) -> None:
    """A further process's part of `pack_sites`: rounds its share, writes nothing."""
    work = _groups(job)
    for _ in _packed([work[i] for i in ranks.broadcast()], job, options, ranks):
        pass


def _groups(job: Job) -> list[Group]:
    found = ((site, job.format(site)) for site in job.layout.sites)
    return [(s, fmt, group) for s, fmt in found if fmt is not None for group in fused_groups(s)]


def _packed(
    left: Sequence[Group], job: Job, options: PackOptions, ranks: Ranks
) -> Iterator[dict[str, Tensor]]:
    """The tensors of every group in order, for the first process; the others make their share."""
    device = choose_device(options.device, ranks)
    rounds = -(-len(left) // ranks.size)
    mine = [left[i] for i in range(ranks.rank, len(left), ranks.size)]
    coming = _read_ahead(job, mine, device)
    for _ in range(rounds):
        found: dict[str, Tensor] = {}
        for (site, fmt, group), stored in islice(coming, 1):
            found = packed_group(job, site, fmt, group, options, device, stored)
        if ranks.size == 1:
            yield found
            continue
        # As safetensors: 8-bit floats cannot be pickled; names apart, for their order.
        whole = {name: tensor.cpu().clone() for name, tensor in found.items()}  # none shared
        for names, data in ranks.gather((list(found), save(whole))):
            if names:
                received = load(data)
                yield {name: received[name] for name in names}


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
