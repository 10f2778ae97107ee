"""One site as a pack job would make it, in memory: what a diagnosis switches on and off."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from quantkit.diagnose.switches import Rounded, Rounder
from quantkit.kernels import reference
from quantkit.model.sites import Site
from quantkit.pack.grid import rule_grid
from quantkit.pack.group import fused_groups
from quantkit.pack.job import Job
from quantkit.pack.rtn import global_divisor, row_pieces
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors, main_and_branch


def rounder(jobs: Mapping[str, Job]) -> Rounder:
    """A rounder whose modes are the names of `jobs`."""

    def round_site(site: Site, mode: Hashable, weights: Mapping[str, Tensor]) -> Rounded | None:
        return pack_site(jobs[str(mode)], site, weights)

    return round_site


def pack_site(job: Job, site: Site, weights: Mapping[str, Tensor]) -> Rounded | None:
    """Round a site's weights ([out, in] by module name) to nearest, as `pack` does.

    None when the job leaves the site as it is.
    """
    fmt = job.scheme.site(site.key, site.kind)
    if fmt is None:
        return None
    separated = job.channels[site.key] if fmt.branch is not None else None
    operands = {}
    for group in fused_groups(site):
        rests, branches = [], []
        for linear in group:
            rest, columns = main_and_branch(weights[linear.module], separated, fmt)
            branch: dict[str, Tensor] = {}
            if columns is not None and separated is not None:
                branch = branch_tensors(columns, separated, fmt)
            rests.append(rest)
            branches.append(branch)
        divisor = global_divisor(rests) if fmt.weights == "nvfp4" else None
        for linear, rest, branch in zip(group, rests, branches, strict=True):
            dtype = reference.compute_dtype(weights[linear.module].dtype)
            rounded = _rounded(rest, fmt, job.scheme.scale_rule, divisor, dtype)
            operands[linear.module] = reference.with_branch(rounded, branch, fmt)
    return Rounded(fmt, job.scheme.scale_rule, separated, operands, job.divisors.get(site.key))


def _rounded(
    rest: Tensor, fmt: SiteFormat, rule: str, divisor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the bytes of a rounded weight stand for, without making the bytes."""
    if fmt.weights == "none":
        return rest.to(dtype)
    parts = [rule_grid(part, fmt.weights, rule, divisor).round(part) for part in row_pieces(rest)]
    return torch.cat(parts).to(dtype)
