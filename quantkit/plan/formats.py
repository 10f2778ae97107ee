"""The formats a site may get, as pack jobs: every one is what `pack` itself would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from quantkit import console
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputRejected, UsageError
from quantkit.model.sites import ModelLayout, Site
from quantkit.pack.job import Job, PackOptions, prepare
from quantkit.pack.layout import stored_bits
from quantkit.pack.scheme import SiteFormat

SPARED = "bf16"
"""The choice that leaves a site as it is: no job of its own, no loss."""

_FREE = PackOptions("nvfp4", branch="fp8", branch_bits=0.25, criterion="weighted")
_GROUPS = PackOptions("osc", mlp_out="mxfp4", hadamard=0)
CANDIDATES: Mapping[str, PackOptions] = {
    "mxfp4": PackOptions("mxfp4", hadamard=0),
    "mxfp4, Hadamard 32": PackOptions("mxfp4", hadamard=32),
    "mxfp4 + bf16 groups of 128": replace(_GROUPS, group=128),
    "mxfp4 + bf16 groups of 64": replace(_GROUPS, group=64),
    "mxfp4 + bf16 groups of 32": replace(_GROUPS, group=32),
    "mxfp4 + fp8 1/4, Hadamard 32": replace(_FREE, scheme="mxfp4", hadamard=32),
    "mxfp4 + fp8 1/2, Hadamard 32": replace(_FREE, scheme="mxfp4", hadamard=32, branch_bits=0.5),
    "nvfp4": PackOptions("nvfp4", hadamard=0),
    "nvfp4 + fp8 1/8": replace(_FREE, hadamard=0, branch_bits=0.125),
    "nvfp4 + fp8 1/4": replace(_FREE, hadamard=0),
    "nvfp4 + fp8 1/2": replace(_FREE, hadamard=0, branch_bits=0.5),
    "nvfp4 + fp8 1": replace(_FREE, hadamard=0, branch_bits=1.0),
    "mxfp8": PackOptions("mxfp8", hadamard=0),
}
"""By name: number format, branch (bits per weight it may spend, or one channel per group), and
online Hadamard."""


def jobs_of(source: Checkpoint, formats: Sequence[str], scale_rule: str) -> dict[str, Job]:
    """The candidates whose number format is among `formats`, as far as the checkpoint allows.

    Raises UsageError for a format that is not known, InputRejected when none is left.
    """
    known = ("mxfp4", "nvfp4", "mxfp8", SPARED)
    if unknown := [name for name in formats if name not in known]:
        raise UsageError(f"--formats {','.join(unknown)}: of {', '.join(known)}")
    found: dict[str, Job] = {}
    for name, options in CANDIDATES.items():
        if number_format(name) not in formats:
            continue
        try:
            found[name] = prepare(source, replace(options, scale_rule=scale_rule))
        except (InputRejected, UsageError) as error:
            console.note(f"without {name}: {error.message}")
    if not found:
        raise InputRejected(f"{source.path}: none of {', '.join(formats)} can be used here")
    return found


def number_format(name: str) -> str:
    """`nvfp4` of `nvfp4 + fp8 1/4`."""
    return name.replace(",", " ").split()[0]


def site_format(jobs: Mapping[str, Job], site: Site, name: str) -> SiteFormat | None:
    """The format a site gets by the name of a candidate."""
    return None if name == SPARED else jobs[name].format(site)


def site_bits(site: Site, fmt: SiteFormat | None) -> int:
    """Bits on disk of a site's weights in a format: scales, branch and indices included."""
    return sum(stored_bits(fmt, *linear.shape) for linear in site.linears)


def weights_of(layout: ModelLayout) -> int:
    """How many weights the sites' linears hold."""
    return sum(prod(linear.shape) for site in layout.sites for linear in site.linears)
