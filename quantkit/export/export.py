"""The step that rewrites a packed checkpoint the way other software reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import console
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import OpenStep, Target, begin_step, open_source, output_of
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.export import modelopt
from quantkit.export.fold import fold_group
from quantkit.export.job import Job, prepare
from quantkit.model.sites import Linear, Site
from quantkit.pack.group import fused_groups
from quantkit.pack.layout import tensors_of
from quantkit.pack.rtn import PIECE
from quantkit.pack.scheme import Scheme, SiteFormat

if TYPE_CHECKING:
    from quantkit.data.tokens import TokenBatch


@dataclass(frozen=True)
class Options:
    """What the user chose. `windows` x `seq_len` tokens of `data` measure what folding costs."""

    to: str = "compressed-tensors"
    fold_outliers: bool = False
    data: str = "sample"
    windows: int = 4
    seq_len: int = 512

    def record(self) -> dict[str, Any]:
        """For the manifest: the options that change the output."""
        return asdict(self) if self.fold_outliers else {"to": self.to}


@dataclass
class Exported:
    """What was written, and what it lost."""

    output: Path
    to: str
    linears: int
    folded: int
    weight_error: dict[str, float] = field(default_factory=dict)  # relative, by kind of site
    excess_nll: float | None = None  # of the output over its input, nats per token
    excess_nll_stderr: float | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """One object for --json."""
        return asdict(self) | {"output": str(self.output), "lossless": not self.folded}

    def as_text(self) -> str:
        """What was written and, when it was not for free, at what price."""
        lines = []
        if self.folded:
            rows = [(kind, f"{100 * error:.2f}%") for kind, error in self.weight_error.items()]
            lines.append(console.table(("site", "weights changed by"), rows))
        if self.excess_nll is not None:
            error = "" if self.excess_nll_stderr is None else f" ± {self.excess_nll_stderr:.4f}"
            lines.append(
                f"costs {self.excess_nll:+.4f}{error} nats per token over its input, "
                f"on {self.tokens} tokens"
            )
        elif self.folded:
            lines.append("what it costs was not measured (--windows 0)")
        else:
            lines.append("every number is as it was")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{self.linears} linears, {self.folded} folded, read as {self.to}")
        return "\n".join([*lines, f"wrote {self.output}"])


def dry_run(
    checkpoint: str | Path | None, options: Options, target: Target
) -> tuple[dict[str, Any], str]:
    """What `export` would do, as JSON and as text; raises what it would raise before writing."""
    source = open_source(checkpoint)
    job = prepare(source, options.to, options.fold_outliers)
    output = output_of(source, options.to, target)
    packed = sum(_size(job, job.before))
    rest = sum(info.nbytes for info in source.tensors.values()) - packed
    largest = max(_size(job, job.before), default=0)
    data: dict[str, Any] = {
        "output": str(output),
        "to": options.to,
        "linears": job.linears,
        "folded": len(job.folded),
        "lossless": not job.folded,
        "left_as_they_are": len(job.layout.linears()) - job.linears,
        "unmatched": list(job.layout.unmatched),
        "bytes_in": packed + rest,
        "bytes_out": sum(_size(job, job.scheme)) + rest,
        # Both versions of a fused group, and the pieces of rows in float32.
        "peak_memory_bytes": 2 * largest + 12 * 4 * PIECE,
        "notes": list(job.notes),
    }
    lines = [
        f"{job.linears} linears, {len(job.folded)} sites folded and rounded again"
        if job.folded
        else f"{job.linears} linears, no number changes",
        f"{data['bytes_in'] / 1e6:.1f} MB -> {data['bytes_out'] / 1e6:.1f} MB, {options.to}",
        f"peak memory about {data['peak_memory_bytes'] / 1e6:.0f} MB above the interpreter's",
        *(f"note: {note}" for note in job.notes),
        f"would write {output}",
    ]
    return data, "\n".join(lines)


def _size(job: Job, scheme: Scheme) -> list[int]:
    """Bytes of every packed fused group under a scheme."""
    found = []
    for site in job.layout.sites:
        fmt = scheme.site(site.key, site.kind)
        for group in fused_groups(site) if fmt is not None else ():
            assert fmt is not None
            tensors = [t for linear in group for t in tensors_of(fmt, *linear.shape).values()]
            found.append(sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors))
    return found


def export(checkpoint: str | Path | None, options: Options, target: Target) -> Exported:
    """Write a packed checkpoint in another's layout, one fused group of weights at a time.

    Lossless unless `fold_outliers`, which puts the branch's channels back among the 4-bit ones;
    its price is measured on text (`windows` 0: not). Raises InputRejected for what is not packed,
    UsageError for what the layout has no word for.
    """
    source = open_source(checkpoint)
    job = prepare(source, options.to, options.fold_outliers)
    output_of(source, options.to, target)
    tokens = _text(source, options) if job.folded else None
    with begin_step(
        "export",
        source,
        options=options.record(),
        suffix=options.to,
        target=target,
        also={"tokens": tokens.digest if tokens else None},
    ) as step:
        scales = _input_scales(step, job, tokens)
        error = _write_sites(step, job, scales)
        step.writer.keep_rest()
        if options.to == modelopt.METHOD:
            section, file = modelopt.write_config(job.scheme, job.layout)
            step.writer.write_file(modelopt.FILE, file)
        else:
            section = job.section
        config = source.config | {"quantization_config": section}
        step.writer.write_file("config.json", (json.dumps(config, indent=2) + "\n").encode())
        done = Exported(
            output=step.writer.output,
            to=options.to,
            linears=job.linears,
            folded=len(job.folded),
            weight_error=error,
            notes=job.notes,
        )
        step.notes |= {"linears": done.linears, "folded": done.folded, "weight_error": error}
        done.output = step.finish()
    if tokens is not None and options.windows:
        from quantkit.export.price import excess_loss

        excess = excess_loss(source.path, done.output, tokens)
        done.excess_nll, done.excess_nll_stderr = excess.mean, excess.stderr
        done.tokens = tokens.ids.numel()
    return done


def _text(source: Checkpoint, options: Options) -> TokenBatch:
    from quantkit.data.tokens import load_tokens

    tokens = load_tokens(
        options.data,
        source.path,
        samples=options.windows or 1,
        seq_len=options.seq_len,
        held_out=True,
    )
    console.note(f"text: {tokens.description}")
    return tokens


def _input_scales(step: OpenStep, job: Job, tokens: TokenBatch | None) -> Mapping[str, Tensor]:
    """NVFP4 input scales of folded linears: their channels come back to the 4-bit path."""
    sizes = {
        linear.module: job.scheme_of(site).hadamard_size
        for site in job.folded
        if job.scheme_of(site).activations == "nvfp4"
        for linear in site.linears
    }
    if not sizes or tokens is None:
        return {}
    from quantkit.export.price import input_scales

    return input_scales(step.source.path, sizes, tokens)


def _write_sites(step: OpenStep, job: Job, scales: Mapping[str, Tensor]) -> dict[str, float]:
    """Write every packed linear; the relative error of folding by kind of site."""
    sums: dict[str, Tensor] = {}
    with console.progress("export", job.layout.n_layers) as progress:
        for layer in range(job.layout.n_layers):
            for site in job.layout.layer_sites(layer):
                fmt = job.before.site(site.key, site.kind)
                if fmt is None:
                    continue
                for group in fused_groups(site):
                    lost = _write_group(step, job, site, fmt, group, scales)
                    if lost is not None:
                        sums[site.kind] = sums.get(site.kind, torch.zeros(2)).double() + lost
            progress.advance()
    return {kind: float((e / max(w, 1e-300)) ** 0.5) for kind, (e, w) in sums.items()}


def _write_group(
    step: OpenStep,
    job: Job,
    site: Site,
    fmt: SiteFormat,
    group: list[Linear],
    scales: Mapping[str, Tensor],
) -> Tensor | None:
    """Keep, rename or fold a group of linears; what folding lost, as two sums of squares."""
    fold, writer = site in job.folded, step.writer
    if not fold and job.to != modelopt.METHOD:
        return None  # kept as they are
    names = [f"{x.module}.{n}" for x in group for n in tensors_of(fmt, *x.shape)]
    if not fold and writer.done(f"{group[0].module}.weight_scale_2"):
        _drop(writer, names)
        return None
    packed = [
        {n: step.source.read(f"{x.module}.{n}") for n in tensors_of(fmt, *x.shape)} for x in group
    ]
    written: dict[str, Tensor] = {}
    lost = torch.zeros(2, dtype=torch.float64)
    if fold:
        keep_hadamard = job.scheme_of(site).hadamard is not None
        parts = fold_group(packed, fmt, job.before.scale_rule, keep_hadamard)
        for linear, part in zip(group, parts, strict=True):
            tensors = dict(part.tensors)
            if linear.module in scales:
                tensors["input_global_scale"] = scales[linear.module]
            written |= {f"{linear.module}.{name}": t for name, t in tensors.items()}
            lost += torch.tensor([part.error, part.energy], dtype=torch.float64)
    else:
        for linear, tensors in zip(group, packed, strict=True):
            converted = modelopt.convert(tensors)
            written |= {f"{linear.module}.{name}": t for name, t in converted.items()}
    writer.write_group(written)
    _drop(writer, names)
    return lost if fold else None


def _drop(writer: CheckpointWriter, names: list[str]) -> None:
    """Leave out the tensors of the source that have no successor of their name."""
    for name in names:
        if not writer.done(name):
            writer.drop(name)
