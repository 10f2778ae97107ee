"""The step that writes a plan beside unchanged weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import console
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import Target, begin_step, open_source, output_of, peak_memory
from quantkit.errors import InputRejected, UsageError
from quantkit.model.families import describe
from quantkit.model.sites import KINDS, ModelLayout, Site
from quantkit.outliers import score
from quantkit.outliers.choose import choose
from quantkit.outliers.plan import FILE, Plan

if TYPE_CHECKING:
    from quantkit.data.tokens import TokenBatch

GROUPS = (32, 64, 128)
# Tiers of the OSC paper by clustering density: what it does with a kind of linear.
TIERS = ((0.60, "high"), (0.35, "moderate"), (0.0, "low"))


@dataclass(frozen=True)
class Separated:
    """The plan that was made and where it is."""

    output: Path
    plan: Plan
    layout: ModelLayout

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Per kind of site: mean clustering density, its tier, channels and share of channels."""
        found = {}
        for kind in KINDS:
            sites = [site for site in self.layout.sites if site.kind == kind]
            densities = [self.plan.density[s.key] for s in sites if s.key in self.plan.density]
            density = sum(densities) / len(densities) if densities else None
            tier = "none" if density is None else next(t for d, t in TIERS if density >= d)
            channels = sum(len(self.plan.sites[site.key]) for site in sites)
            width = sum(site.width for site in sites)
            found[kind] = {
                "density": density,
                "tier": tier,
                "channels": channels,
                "groups_bypassed": sum(-(-s.width // self.plan.group) for s in sites) - channels,
                "share": channels / width,
            }
        return found

    def as_json(self) -> dict[str, Any]:
        """One object for --json."""
        return {
            "output": str(self.output),
            "criterion": self.plan.criterion,
            "group": self.plan.group,
            "kinds": self.by_kind(),
            "density": dict(self.plan.density),
        }

    def as_text(self) -> str:
        """The table of clustering density by kind of site."""
        rows = [
            (
                kind,
                "-" if row["density"] is None else f"{row['density']:.2f}",
                row["tier"],
                row["channels"],
                f"{100 * row['share']:.2f}%",
                row["groups_bypassed"],
            )
            for kind, row in self.by_kind().items()
        ]
        headers = ("site", "density", "clustering", "channels", "of all", "groups bypassed")
        return "\n".join(
            [
                console.table(headers, rows),
                f"density: share of the tokens above 5 x mean|x| whose group maximum is the "
                f"group's modal channel, mean over groups of {self.plan.group} and layers",
                f"wrote {self.output / FILE}",
            ]
        )


def separate_outliers(
    checkpoint: str | Path | None,
    target: Target,
    *,
    group: int = 32,
    criterion: str = "mode",
    data: str | None = None,
    samples: int = 8,
) -> Separated:
    """Choose at most one channel of every group of every site, and write `outliers.json`.

    `data` and `samples` say what the criterion `error` is measured on (default: the text of the
    calibration). Raises UsageError for unknown options, InputRejected for missing or stale
    statistics.
    """
    source, layout = _opened(checkpoint, group, criterion)
    options = {"group": group, "criterion": criterion}
    with begin_step(
        "separate-outliers", source, options=options, suffix="separated", target=target
    ) as step:
        errors = None
        if criterion == "error":
            errors = measure_errors(source, layout, data, samples)
        plan = choose(source, layout.sites, group=group, criterion=criterion, errors=errors)
        step.writer.keep_rest()
        step.writer.write_file(FILE, plan.encode())
        result = Separated(step.writer.output, plan, layout)
        step.notes["density"] = {k: row["density"] for k, row in result.by_kind().items()}
        step.finish(statistics_digest=plan.statistics_digest)
    return result


def _opened(
    checkpoint: str | Path | None, group: int, criterion: str
) -> tuple[Checkpoint, ModelLayout]:
    if group not in GROUPS:
        raise UsageError(f"--group {group}: one of {', '.join(map(str, GROUPS))}")
    if criterion not in score.CRITERIA:
        raise UsageError(f"--criterion {criterion}: one of {', '.join(score.CRITERIA)}")
    source = open_source(checkpoint)
    if "quantization_config" in source.config:
        raise InputRejected(f"{source.path}: is packed already", "separate before packing")
    return source, describe(source.config, source.tensors)


def preview(
    checkpoint: str | Path | None,
    target: Target,
    *,
    group: int = 32,
    criterion: str = "mode",
    data: str | None = None,
    samples: int = 8,
) -> tuple[dict[str, Any], str]:
    """What the step would do and take, from one block (and one window): JSON and text."""
    source, layout = _opened(checkpoint, group, criterion)
    output = output_of(source, "separated", target)
    sites, memory = layout.layer_sites(0), 0
    started = time.perf_counter()
    if criterion == "error":
        tokens, one = _text(source, data, samples), replace(layout, n_layers=1, sites=sites)
        memory = tokens.ids.numel() * layout.hidden * 2 + 4 * max(s.width for s in sites) * len(
            tokens.ids[0]
        )
        _errors(source, one, tokens.ids[:1])  # the first time something is imported
        started = time.perf_counter()
        _errors(source, one, tokens.ids[:1])
        seconds = (time.perf_counter() - started) * layout.n_layers * len(tokens.ids)
    else:
        choose(source, sites, group=group, criterion=criterion)
        seconds = (time.perf_counter() - started) * layout.n_layers
    widths = sum(site.width for site in layout.sites)
    found: dict[str, Any] = {
        "output": str(output),
        "sites": len(layout.sites),
        "most_channels": sum(-(-site.width // group) for site in layout.sites),
        "of_channels": widths,
        "unmatched": list(layout.unmatched),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory() + memory,
    }
    return found, (
        f"{found['sites']} sites: at most {found['most_channels']} of {widths} channels, by "
        f"{criterion} in groups of {group}\nabout {seconds:.0f} s and "
        f"{found['peak_memory_bytes'] / 1e9:.2f} GB of memory; the weights stay as they are\n"
        f"would write {output / FILE}"
    )


def measure_errors(
    source: Checkpoint, layout: ModelLayout, data: str | None, samples: int
) -> dict[str, Tensor]:
    """`score.error_reduction` of every site, block by block on the unquantized model.

    Float64 [channels] by site key; zeros for an expert that saw no token.
    """
    tokens = _text(source, data, samples)
    console.note(f"data: {tokens.description}")
    return _errors(source, layout, tokens.ids)


def _text(source: Checkpoint, data: str | None, samples: int) -> TokenBatch:
    from quantkit.data.tokens import load_tokens

    step = source.manifest.last("calibrate") if source.manifest else None
    recorded = step.options if step else {}
    spec = data or recorded.get("data")
    if spec is None:
        raise UsageError("--criterion error measures on text", "give --data")
    seed = step.seed or 0 if step else 0
    return load_tokens(
        spec, source.path, samples=samples, seq_len=recorded.get("seq_len"), seed=seed
    )


def _errors(source: Checkpoint, layout: ModelLayout, ids: Tensor) -> dict[str, Tensor]:
    from quantkit.model.block import BlockRunner

    errors = {site.key: torch.zeros(site.width, dtype=torch.float64) for site in layout.sites}

    def watch(site: Site, x: Tensor) -> None:
        errors[site.key] += score.error_reduction(x)

    runner = BlockRunner(source, layout)
    hidden = [runner.embed(batch) for batch in ids.split(1)]
    with console.progress("separate", layout.n_layers) as progress:
        for i in range(layout.n_layers):
            block = runner.load(i)
            hidden = [runner.capture(block, i, states, watch) for states in hidden]
            progress.advance()
    return errors
