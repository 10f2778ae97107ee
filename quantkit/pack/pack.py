"""Pack a checkpoint: linear by linear, everything else taken along unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import console
from quantkit.checkpoint.measure import sizes
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import OpenStep, Target, begin_step, open_source, output_of
from quantkit.errors import InputRejected
from quantkit.export import compressed_tensors
from quantkit.model.sites import Linear, Site, read_weight
from quantkit.pack.job import Job, PackOptions, prepare
from quantkit.pack.layout import tensors_of
from quantkit.pack.rounding import PackedLinear, round_weight
from quantkit.pack.rtn import global_divisor, row_pieces
from quantkit.pack.scheme import Scheme, SiteFormat
from quantkit.pack.separate import rotated, separate


@dataclass(frozen=True)
class PackResult:
    """What was packed and where it is."""

    output: Path
    scheme: Scheme
    linears: int
    quant_method: str
    bits: dict[str, float]  # per weight by site kind, counted from the files

    def as_json(self) -> dict[str, Any]:
        """One object for --json."""
        return {
            "output": str(self.output),
            "scheme": self.scheme.name,
            "scale_rule": self.scheme.scale_rule,
            "quant_method": self.quant_method,
            "linears": self.linears,
            "bits_per_weight": self.bits,
        }

    def as_text(self) -> str:
        """Format and bits by kind of site, and where the checkpoint is."""
        rows = []
        for kind, bits in self.bits.items():
            fmt = self.scheme.sites.get(kind)
            words = "" if kind == "all" else fmt.words() if fmt is not None else "as it is"
            others = sum(key.endswith(f".{kind}") for key in self.scheme.overrides)
            rows.append((kind, words + (f" ({others} differ)" if others else ""), f"{bits:.3f}"))
        return "\n".join(
            [
                console.table(("site", "format", "bits/weight"), rows),
                f"{self.linears} linears packed, scale rule {self.scheme.scale_rule}, "
                f"read as {self.quant_method}",
                f"wrote {self.output}",
            ]
        )


def pack(checkpoint: str | Path | None, options: PackOptions, target: Target) -> PackResult:
    """Write a packed checkpoint beside its source, holding one fused group of weights at a time.

    Raises InputRejected for a packed or damaged input, NaN weights, a stale plan or stale
    statistics, and widths that do not fit; UsageError for options that do not go together.
    """
    source = open_source(checkpoint)
    output_of(source, suffix(options), target)  # refused before anything is computed
    job = prepare(source, options)
    config = packed_config(job, options)
    method = config["quantization_config"]["quant_method"]
    with begin_step(
        "pack",
        source,
        options=options.record(),
        suffix=suffix(options),
        target=target,
        also={"plan": job.plan_digest, "statistics": job.statistics_digest},
    ) as step:
        linears = _pack_sites(step, job, options)
        step.writer.keep_rest()
        step.writer.write_file("config.json", (json.dumps(config, indent=2) + "\n").encode())
        step.notes |= {
            "linears": linears,
            "scale_rule": job.scheme.scale_rule,
            "quant_method": method,
        }
        output = step.finish(statistics_digest=job.statistics_digest, plan_digest=job.plan_digest)
    written = sizes(open_checkpoint(output))
    bits = {part.kind: part.bits for part in written.linears}
    bits["all"] = written.linear_bits
    return PackResult(output, job.scheme, linears, method, bits)


def suffix(options: PackOptions) -> str:
    """What the output is called by default: `model-osc`."""
    return options.scheme if options.dtype is None else f"{options.scheme}-{options.dtype}"


def packed_config(job: Job, options: PackOptions) -> dict[str, Any]:
    """The output's `config.json`: compressed-tensors' description where it can say everything."""
    config = dict(job.source.config)
    if compressed_tensors.can_describe(job.scheme):
        section = compressed_tensors.write_config(job.scheme, job.layout)
    else:
        section = job.scheme.to_json()
    if options.dtype is not None:
        config["dtype"] = options.dtype
        config.pop("torch_dtype", None)
    return config | {"quantization_config": section}


def _pack_sites(step: OpenStep, job: Job, options: PackOptions) -> int:
    linears = 0
    with console.progress("pack", job.layout.n_layers) as progress:
        for layer in range(job.layout.n_layers):
            sites = job.layout.layer_sites(layer)
            unfused = any(s.expert is not None and _format(job, s) for s in sites)
            for site in sites:
                fmt = _format(job, site)
                if fmt is not None:
                    for group in fused_groups(site):
                        _pack_group(step, job, site, fmt, group, options.rounding)
                    linears += len(site.linears)
                elif unfused:
                    _unfuse(step, site)
            progress.advance()
    return linears


def _format(job: Job, site: Site) -> SiteFormat | None:
    return job.scheme.site(site.key, site.kind)


def fused_groups(site: Site) -> Iterator[list[Linear]]:
    """The linears of a site that loaders fuse (q, k, v; gate, up of one expert)."""
    groups: dict[str, list[Linear]] = {}
    for linear in site.linears:
        groups.setdefault(linear.module.rpartition(".")[0], []).append(linear)
    yield from groups.values()


def _pack_group(
    step: OpenStep, job: Job, site: Site, fmt: SiteFormat, group: Sequence[Linear], method: str
) -> None:
    writer = step.writer
    for linear in group:
        writer.drop(linear.tensor)
    if writer.done(f"{group[0].module}.{next(iter(tensors_of(fmt, *group[0].shape)))}"):
        return  # the whole group is: it was written at once
    weights, branches = [], []
    for linear in group:
        weight = finite(read_weight(job.source, linear), linear)
        weight = weight.float() if fmt.weights == "none" else weight
        branch: dict[str, Tensor] = {}
        if fmt.branch is not None:
            weight, branch = separate(weight, job.channels[site.key], fmt)
        weights.append(rotated(weight, fmt))
        branches.append(branch)
    divisor = global_divisor(weights) if fmt.weights == "nvfp4" else None
    written: dict[str, Tensor] = {}
    for linear, branch in zip(group, branches, strict=True):
        main = round_weight(
            weights.pop(0), fmt, method=method, rule=job.scheme.scale_rule, divisor=divisor
        )
        packed: PackedLinear = main | branch
        if fmt.activations == "nvfp4":
            packed["input_global_scale"] = job.divisors[site.key]
        written |= {f"{linear.module}.{name}": tensor for name, tensor in packed.items()}
    writer.write_group(written)


def _unfuse(step: OpenStep, site: Site) -> None:
    """Give a linear of a mixture that stays as it is a tensor of its own: experts are modules."""
    for linear in site.linears:
        name = f"{linear.module}.weight"
        if linear.expert is not None:
            step.writer.drop(linear.tensor)
            if not step.writer.done(name):
                step.writer.write(name, read_weight(step.source, linear))


def finite(weight: Tensor, linear: Linear) -> Tensor:
    """Give the weight back; InputRejected when it holds NaN or infinity."""
    for part in row_pieces(weight):
        # A sum meets every element at a fraction of the price of isfinite().all().
        if not torch.isfinite(part.sum(dtype=torch.float32)) and not torch.isfinite(part).all():
            raise InputRejected(f"{linear.module}.weight holds NaN or infinity")
    return weight
