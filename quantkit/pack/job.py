"""What a pack run will do, before anything is written: every site's format and channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import console
from quantkit.checkpoint.manifest import online_hadamards
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputRejected, UsageError
from quantkit.formats import nvfp4
from quantkit.model.families import describe
from quantkit.model.sites import KINDS, ModelLayout, Site
from quantkit.outliers.budget import evened, expected_loss
from quantkit.outliers.choose import choose
from quantkit.outliers.plan import FILE as PLAN_FILE
from quantkit.outliers.plan import Plan, load_plan
from quantkit.pack import scheme as schemes
from quantkit.pack.inputs import Inputs
from quantkit.pack.layout import check_width, padded
from quantkit.pack.recipes import PLANNED, resolved
from quantkit.pack.rounding import FROM_INPUTS, METHODS
from quantkit.pack.rtn import power_of_two_below
from quantkit.pack.scheme import Scheme, SiteFormat, from_sites
from quantkit.pack.site_plan import load_site_plan

Ends = tuple[SiteFormat | None, SiteFormat | None]  # of head and embedding


@dataclass(frozen=True)
class PackOptions:
    """What the user chose."""

    scheme: str = "osc"
    group: int | None = None  # of the outlier groups; default: the plan's, or 32
    scale_rule: str = "even"
    branch: str | None = None  # default: the recipe's, or bf16
    mlp_out: str | None = None
    sites: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None  # "float32": pass through with no rounding
    rounding: str | None = None  # default: the recipe's, or rtn
    branch_bits: float | None = None  # bits per weight for the branch, channels chosen freely
    criterion: str | None = None  # of the free choice
    hadamard: int | None = None  # block of the online Hadamard; default: what `rotate` recorded
    balance: bool | None = None  # even out channel energies before rounding
    asymmetric: bool | None = None  # gptq, learned: towards the unquantized model's outputs
    four_over_six: bool = False  # NVFP4 scales: the maximum at 6 or 4
    steps: int | None = None  # of learned rounding, each block
    data: str | None = None  # text to round on; default: the calibration's
    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    plan: str | None = None  # file of a site plan, in place of a scheme
    head: str | None = None  # format of the output head; default: as it is
    embedding: str | None = None  # of the embedding

    def record(self) -> dict[str, Any]:
        """The options that are set, for the manifest."""
        return {name: value for name, value in self.__dict__.items() if value not in (None, {})}


def parse_sites(choices: Iterable[str]) -> dict[str, str]:
    """`["mlp_out=bf16"]` -> `{"mlp_out": "bf16"}`; UsageError for anything else."""
    found = {}
    for choice in choices:
        kind, equals, text = choice.partition("=")
        if not equals or not kind or not text:
            raise UsageError(f"--site {choice!r} is not KIND=FORMAT", "like --site mlp_out=bf16")
        found[kind] = text
    return found


@dataclass(frozen=True)
class Job:
    """A checkpoint, what its sites become, and where that was decided."""

    source: Checkpoint
    weights: Checkpoint  # the source as it is rounded: balanced or as it is
    layout: ModelLayout
    scheme: Scheme
    channels: Mapping[str, Tensor]  # separated channels by site key, int64
    divisors: Mapping[str, Tensor]  # NVFP4 input global scales by site key, float32 [1]
    plan_digest: str | None
    statistics_digest: str | None
    energies: Mapping[str, Tensor] = field(default_factory=dict)  # mean square by site and channel

    def format(self, site: Site) -> SiteFormat | None:
        """The format of a site; None when it stays as it is."""
        return self.scheme.site(site.key, site.kind)

    def importance(self, site: Site, fmt: SiteFormat) -> Tensor | None:
        """How much a column's rounding error counts: its inputs' mean square, as they are met.

        None without statistics. A Hadamard evens out the energy of the channels it mixes.
        """
        energy = self.energies.get(site.key)
        if energy is None:
            return None
        energy = energy.clone()
        if site.key in self.channels and not fmt.appended:
            energy[self.channels[site.key]] = 0
        energy = evened(energy, fmt.hadamard_size)
        if fmt.appended:
            lost = expected_loss(energy, fmt.activations)[self.channels[site.key]]
            energy = torch.cat([energy, lost, lost.new_zeros(fmt.appended - len(lost))])
        return energy.float()


def prepare(source: Checkpoint, options: PackOptions) -> Job:
    """Decide the format of every site. Raises InputRejected and UsageError as `pack` does."""
    if "quantization_config" in source.config:
        raise InputRejected(
            f"{source.path}: is packed already", "pack the checkpoint it was made from"
        )
    if options.dtype not in (None, "float32"):
        raise UsageError(f"--dtype {options.dtype}: only float32, which packs with no rounding")
    layout = describe(source.config, source.tensors)
    options = resolved(options)
    _check_rounding(options)
    ends = _ends(layout, options)
    if options.plan is not None:
        return _planned(source, layout, options, Path(options.plan), ends)
    scheme = schemes.build(
        options.scheme,
        group=options.group or 32,
        scale_rule=options.scale_rule,
        branch=options.branch or "bf16",
        mlp_out=options.mlp_out,
        sites=options.sites,
        separated=options.branch_bits is not None,
    )
    if options.dtype is not None:
        scheme = schemes.pass_through(scheme)
    formats = {site.key: scheme.site(site.key, site.kind) for site in layout.sites}
    separated = [s for s in layout.sites if (f := formats[s.key]) is not None and f.branch]
    online = online_hadamards(source.manifest)
    if options.hadamard is not None:
        online = dict.fromkeys(KINDS, {"block": options.hadamard} if options.hadamard else None)
    for site in layout.sites:
        if (fmt := formats[site.key]) is not None:
            hadamard = online.get(site.key, online.get(site.kind))
            formats[site.key] = replace(fmt, hadamard=dict(hadamard) if hadamard else None)
    _check_residual(separated, formats, options)
    inputs = Inputs.load(source, layout, options) if _needs_inputs(options) else None
    weights: Checkpoint = inputs.weights if inputs else source
    plan: Plan | None = None
    if separated and options.branch_bits is not None:
        assert inputs is not None
        plan = inputs.plan(separated, formats, options)
    elif separated:
        plan = _plan(source, separated, options.group)
    channels = {}
    if plan is not None:
        channels = {s.key: torch.tensor(plan.sites[s.key], dtype=torch.long) for s in separated}
    for site in layout.sites:
        found = formats[site.key]
        if found is not None:
            formats[site.key] = _site_format(site, found, channels.get(site.key), plan)
    scales = inputs.scales if inputs else {}
    divisors, statistics = _input_divisors(source, layout, formats, channels, scales)
    if plan is not None:
        statistics = plan.statistics_digest
    elif inputs is not None:
        statistics = inputs.statistics.digest
    return Job(
        source,
        weights,
        layout,
        from_sites(scheme.name, layout, formats, scheme.scale_rule).with_ends(*ends),
        channels,
        divisors,
        None if plan is None else sha256(plan.encode()).hexdigest(),
        statistics,
        inputs.energies if inputs else {},
    )


def _planned(
    source: Checkpoint, layout: ModelLayout, options: PackOptions, path: Path, ends: Ends
) -> Job:
    """The job of a site plan: formats and channels stand in it."""
    decided = {"group", "branch", "branch_bits", "mlp_out", "sites", "criterion", "hadamard"}
    clash = sorted((decided | {"balance"}) & set(options.record()))
    if options.scheme != PLANNED:
        clash.append("scheme")
    if clash:
        raise UsageError(f"--plan decides on {', '.join(clash)}", "leave it out, or the plan")
    plan = load_site_plan(path, source, layout)
    formats = dict(plan.formats)
    for site in layout.sites:
        if (fmt := formats[site.key]) is not None:
            check_width(fmt, site.width, site.key)
            if options.dtype is not None:
                formats[site.key] = schemes.unrounded(fmt)
    channels = {key: torch.tensor(found) for key, found in plan.channels.items()}
    inputs = Inputs.load(source, layout, options) if _needs_inputs(options) else None
    divisors, statistics = _input_divisors(source, layout, formats, channels, {})
    return Job(
        source,
        source,
        layout,
        from_sites(PLANNED, layout, formats, plan.scale_rule).with_ends(*ends),
        channels,
        divisors,
        plan.digest,
        statistics or plan.statistics_digest,
        inputs.energies if inputs else {},
    )


def _ends(layout: ModelLayout, options: PackOptions) -> Ends:
    """The formats of head and embedding; UsageError where the model or the options rule them out.

    A tied head is the embedding: one packed matrix can be both, but one of them packed and the
    other not would take more bytes than the 16-bit matrix alone.
    """
    names = {"--head": options.head, "--embedding": options.embedding}
    asked = {option: name for option, name in names.items() if name is not None}
    found = {option: schemes.end_format(name, option) for option, name in asked.items()}
    if asked and options.dtype is not None:
        raise UsageError(f"--dtype rounds nothing: leave out {' and '.join(asked)}")
    if layout.tied and asked and options.head != options.embedding:
        name = next(iter(asked.values()))
        raise UsageError(
            "the output head is the embedding (tied): they are packed together or not at all",
            f"--head {name} --embedding {name}",
        )
    for option, fmt in found.items():
        check_width(fmt, layout.hidden, option, f"leave out {option}")
    return found.get("--head"), found.get("--embedding")


def _check_rounding(options: PackOptions) -> None:
    if options.rounding not in METHODS:
        raise UsageError(
            f"--rounding {options.rounding}: one of {', '.join(METHODS)}",
        )
    if options.four_over_six and options.rounding == "search":
        raise UsageError("--four-over-six goes with the other roundings; search covers it")
    if options.asymmetric and options.rounding not in FROM_INPUTS:
        raise UsageError("--asymmetric goes with --rounding gptq or learned")
    if options.steps is not None and (options.rounding != "learned" or options.steps < 1):
        raise UsageError("--steps are those of --rounding learned, at least 1")


def _needs_inputs(options: PackOptions) -> bool:
    return bool(options.balance or options.branch_bits is not None or options.rounding == "search")


def _check_residual(
    separated: list[Site], formats: Mapping[str, SiteFormat | None], options: PackOptions
) -> None:
    """UsageError for a residual branch that is asked for nowhere, or of channels that rotate."""
    found = [site for site in separated if (f := formats[site.key]) and f.branch == "residual"]
    if options.branch == "residual" and not found:
        raise UsageError(
            f"--branch residual: no site of {options.scheme} has a branch",
            "--branch-bits says how much to spend on one",
        )
    for site in found:
        fmt = formats[site.key]
        if fmt is not None and fmt.hadamard_size and options.branch_bits is None:
            raise UsageError(
                f"{site.key}: a plan's channels are those of the unrotated input, a residual's are "
                f"those behind its Hadamard of {fmt.hadamard_size}",
                "give --branch-bits, or --hadamard 0",
            )


def _plan(source: Checkpoint, separated: list[Site], group: int | None) -> Plan:
    """The checkpoint's plan, completed from its statistics, or one made from them."""
    plan = load_plan(source)
    if plan is not None and group is not None and plan.group != group:
        raise UsageError(
            f"{source.path / PLAN_FILE} was made with groups of {plan.group}, not {group}",
            f"leave --group out, or: quantkit separate-outliers {source.path} --group {group}",
        )
    missing = [s for s in separated if plan is None or s.key not in plan.sites]
    if plan is not None and not missing:
        _check_channels(plan, separated, source)
        return plan
    size = plan.group if plan is not None else group or 32
    made = choose(source, missing, group=size, criterion="mode")
    what = "no plan" if plan is None else f"the plan lacks {len(missing)} sites"
    console.note(f"{what}: separating by mode in groups of {size}, from the statistics")
    if plan is None:
        return made
    _check_channels(plan, separated, source)
    return replace(plan, sites={**plan.sites, **made.sites})


def _check_channels(plan: Plan, separated: list[Site], source: Checkpoint) -> None:
    for site in separated:
        channels = plan.sites.get(site.key, ())
        if channels and channels[-1] >= site.width:
            raise InputRejected(
                f"{source.path / PLAN_FILE}: {site.key} has no channel {channels[-1]}",
                f"make it again: quantkit separate-outliers {source.path}",
            )


def _site_format(
    site: Site,
    fmt: SiteFormat,
    channels: Tensor | None,
    plan: Plan | None,
) -> SiteFormat:
    if fmt.branch is not None:
        assert channels is not None
        assert plan is not None
        if len(channels):
            fmt = replace(fmt, outliers=padded(len(channels), fmt), group=plan.group)
        else:
            fmt = replace(fmt, branch=None)  # nothing to separate here
    check_width(fmt, site.width, site.key)
    return fmt


def _input_divisors(
    source: Checkpoint,
    layout: ModelLayout,
    formats: Mapping[str, SiteFormat | None],
    channels: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], str | None]:
    """NVFP4's static input scales, from the calibrated absmax of what stays on the 4-bit path."""
    sites = [s for s in layout.sites if (f := formats[s.key]) and f.activations == "nvfp4"]
    if not sites:
        return {}, None
    from quantkit.calibrate.store import load_statistics

    statistics = load_statistics(source)
    divisors = {}
    for site in sites:
        if not statistics.has(site.key):  # an expert that saw too few tokens to tell
            continue
        absmax = statistics.get(site.key, "absmax").float().clone()
        if site.key in scales:
            absmax /= scales[site.key].float()
        fmt = formats[site.key]
        if site.key in channels and (fmt is None or not fmt.appended):
            absmax[channels[site.key]] = 0
        if fmt is not None and fmt.hadamard_size:  # no more than all of a block's maxima together
            absmax = absmax.view(-1, fmt.hadamard_size).square().sum(1).sqrt()
        divisors[site.key] = power_of_two_below(nvfp4.global_scale(absmax.amax()))
    for site in sites:
        if site.key not in divisors:  # as wide a range as any other expert of the layer needs
            others = (s.key for s in layout.layer_sites(site.layer) if s.kind == site.kind)
            known = [divisors[key] for key in others if key in divisors]
            divisors[site.key] = torch.stack(known).amin(0) if known else torch.ones(1)
    return divisors, statistics.digest
