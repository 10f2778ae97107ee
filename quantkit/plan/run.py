"""`plan`: formats site by site for a budget of bits, or for a limit on the loss.

Every format of every site is judged cheaply (sensitivity.py), budgets are spent by that
(allocate.py), and the plans that come out are run beside the uniform ones on text that the
judgement has not seen. What is written is the best plan as measured, a uniform one if that is it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import console
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import open_source, peak_memory, versions
from quantkit.data.tokens import TokenBatch, load_tokens
from quantkit.diagnose.packing import rounder
from quantkit.diagnose.run import unpacked
from quantkit.diagnose.sweep import Arrangement, sweep
from quantkit.diagnose.switches import PLAIN
from quantkit.errors import UsageError
from quantkit.evaluate.models import choose_device
from quantkit.evaluate.perplexity import compare
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import ModelLayout
from quantkit.model.timing import ROUNDED, pace
from quantkit.pack.job import Job
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.site_plan import SitePlan
from quantkit.plan.formats import SPARED, jobs_of, site_format
from quantkit.plan.kept import Kept, partial
from quantkit.plan.proposals import AROUND, GRID, Choice, Market, Proposal
from quantkit.plan.sensitivity import sensitivities

TOGETHER = 4  # plans run in one pass over the blocks; the results of each pass are kept
REFINEMENTS = 2  # rounds of budgets between the last plan above a limit and the first below


@dataclass(frozen=True)
class Options:
    """What to plan for (`bits` per weight or `max_drop` in nats per token) and on which text."""

    bits: float | None = None
    max_drop: float | None = None
    formats: tuple[str, ...] = ("mxfp4", "nvfp4", "mxfp8")
    scale_rule: str = "even"
    data: str | None = None  # default: the calibration's
    samples: int = 4  # windows to judge formats on
    windows: int = 8  # windows to run plans on
    seq_len: int | None = None
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A proposal and what it lost: nats per token, standard error over windows."""

    proposal: Proposal
    excess_nll: float
    stderr: float | None

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.proposal.bits

    def as_dict(self, others: Sequence[Point]) -> dict[str, Any]:
        """For JSON; `frontier`: no plan with as few bits loses less."""
        return {
            "name": self.proposal.name,
            "bits": self.bits,
            "expected": self.proposal.expected,
            "excess_nll": self.excess_nll,
            "stderr": self.stderr,
            "frontier": not any(
                p.bits <= self.bits and p.excess_nll < self.excess_nll for p in others
            ),
        }


@dataclass(frozen=True)
class _Setting:
    """What everything below works on."""

    source: Checkpoint
    layout: ModelLayout
    jobs: Mapping[str, Job]
    names: tuple[str, ...]  # of what a site can get: the jobs, and SPARED where it is allowed
    judged_on: torch.Tensor
    run_on: torch.Tensor
    description: str
    digest: str


def plan(
    checkpoint: str | Path | None,
    options: Options,
    output: Path,
    overwrite: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Measure, choose, run, and write the plan to `output`; everything found as JSON.

    An interrupted run continues from `OUTPUT.partial`, unless `restart`. Raises InputRejected and
    UsageError.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", "--overwrite replaces it; -o names another")
    if restart:
        partial(output).unlink(missing_ok=True)
    setting = _setting(checkpoint, options)
    runner = BlockRunner(setting.source, setting.layout, device=_device(options))
    runner.keep_head = True
    kept = Kept(output, _head(setting, options))
    costs = sensitivities(
        runner, setting.judged_on, setting.jobs, seed=options.seed, known=kept.costs, keep=kept.keep
    )
    market = Market.of(setting.layout, setting.jobs, setting.names, costs)
    if options.bits is not None:
        if options.bits < market.least:
            raise UsageError(f"--bits {options.bits}: the least here is {market.least:.3f}")
        points = _run(runner, setting, kept, market.for_bits(options.bits))
    else:
        assert options.max_drop is not None
        points = _run(runner, setting, kept, market.for_limit())
        for _ in range(REFINEMENTS):
            between = market.between(*_bracket(points, options.max_drop))
            known = {point.proposal.digest for point in points}
            points += _run(runner, setting, kept, [p for p in between if p.digest not in known])
    chosen = _choose(points, options)
    _write(_site_plan(setting, chosen, options), output)
    kept.path.unlink(missing_ok=True)
    points.sort(key=lambda point: point.bits)
    return {
        "output": str(output),
        "checkpoint": str(setting.source.path),
        "chosen": chosen.proposal.name,
        "bits": chosen.bits,
        "excess_nll": chosen.excess_nll,
        "stderr": chosen.stderr,
        "pareto": [point.as_dict(points) for point in points],
        "sites": chosen.proposal.choice,
        "data": setting.description,
        "kernel": "reference",  # the sites are simulated with the packed arithmetic in torch
    }


def dry_run(checkpoint: str | Path | None, options: Options) -> dict[str, Any]:
    """What `plan` would run, about how long it takes, and the memory it needs."""
    setting = _setting(checkpoint, options)
    layout = setting.layout
    runner = BlockRunner(setting.source, layout, device=_device(options))
    measured = pace(runner, setting.judged_on[:1])
    looks, runs = len(setting.judged_on), len(setting.run_on)
    plans = 6 + (len(AROUND) + 2 if options.bits is not None else len(GRID) + 2 * REFINEMENTS)
    # forward, forward and backward (about four passes), and a quarter pass for each format
    judging = looks * (4 + 0.25 * len(setting.jobs)) * measured.whole(layout.n_layers)
    running = runs * plans * ROUNDED * measured.whole(layout.n_layers)
    state = setting.judged_on.numel() * layout.hidden * runner.dtype.itemsize
    block = sum(t.nbytes for t in setting.source.tensors.values()) // layout.n_layers
    return {
        "checkpoint": str(setting.source.path),
        "data": setting.description,
        "sites": len(layout.sites),
        "formats": list(setting.jobs),
        "plans": plans,
        "seconds": judging + running,
        "peak_memory_bytes": peak_memory()
        + (layout.n_layers + 2) * state
        + (4 + len(setting.jobs)) * block,
    }


def _setting(checkpoint: str | Path | None, options: Options) -> _Setting:
    source = unpacked(open_source(checkpoint))
    if (options.bits is None) == (options.max_drop is None):
        raise UsageError("say --bits or --max-drop", "like --bits 4.75 (bits per weight, in all)")
    layout = describe(source.config, source.tensors)
    jobs = jobs_of(source, options.formats, options.scale_rule)
    tokens = _text(source, options)
    console.note(f"text: {tokens.description}")
    judged, run = tokens.ids[-options.windows - options.samples :].split(
        [options.samples, options.windows]
    )
    names = (*jobs, SPARED) if SPARED in options.formats else tuple(jobs)
    return _Setting(source, layout, jobs, names, judged, run, tokens.description, tokens.digest)


def _text(source: Checkpoint, options: Options) -> TokenBatch:
    """Windows that calibration did not draw, where the text has more; judging and running apart."""
    calibrated = source.manifest.last("calibrate") if source.manifest else None
    recorded = calibrated.options if calibrated else {}
    spec = options.data or recorded.get("data")
    if spec is None:
        raise UsageError("a plan is measured on text", "give --data")
    need = options.samples + options.windows
    # a file of token ids gives its rows in order, text draws by the seed
    past = (recorded.get("samples") or 0) if ".safetensors" in spec else 0
    seed = options.seed + 1
    found = load_tokens(spec, source.path, samples=past + need, seq_len=options.seq_len, seed=seed)
    if len(found.ids) < need:
        raise UsageError(
            f"{len(found.ids)} windows of text; {need} are needed",
            "give more --data, or fewer --samples and --windows",
        )
    return found


def _device(options: Options) -> torch.device:
    return torch.device(choose_device(options.device))


def _head(setting: _Setting, options: Options) -> dict[str, Any]:
    """What the numbers depend on; an interrupted run of another one is not continued."""
    jobs = {n: [job.plan_digest, job.statistics_digest] for n, job in setting.jobs.items()}
    return {
        "weights": setting.source.weights_digest(),
        "tokens": setting.digest,
        "split": [len(setting.judged_on), len(setting.run_on)],
        "jobs": jobs,
        "rule": options.scale_rule,
        "seed": options.seed,
        "versions": versions(),
    }


def _run(
    runner: BlockRunner, setting: _Setting, kept: Kept, proposals: Sequence[Proposal]
) -> list[Point]:
    """Excess loss of the proposals, those of an interrupted run as they were found."""
    todo = [p for p in proposals if p.digest not in kept.runs]
    for few in (todo[i : i + TOGETHER] for i in range(0, len(todo), TOGETHER)):
        arrangements: dict[str, Arrangement] = {"plain": lambda site: PLAIN}
        arrangements |= {p.digest: _arrangement(p.choice) for p in few}
        swept = sweep(runner, setting.run_on, arrangements, rounder(setting.jobs), label="plans")
        for proposal in few:
            excess = compare(swept.losses["plain"], swept.losses[proposal.digest])
            kept.runs[proposal.digest] = excess.mean, excess.stderr
        kept.keep(kept.costs)
    return [Point(p, *kept.runs[p.digest]) for p in proposals]


def _arrangement(choice: Choice) -> Arrangement:
    return lambda site: PLAIN if choice[site.key] == SPARED else choice[site.key]


def _bracket(points: Sequence[Point], limit: float) -> tuple[float, float]:
    """Bits of the dearest plan above the limit, and of the cheapest that keeps it."""
    high = min((p.bits for p in points if p.excess_nll <= limit), default=16.0)
    low = max((p.bits for p in points if p.excess_nll > limit and p.bits < high), default=high)
    return low, high


def _choose(points: Sequence[Point], options: Options) -> Point:
    if options.bits is not None:
        fits = [p for p in points if p.bits <= options.bits + 1e-9]
        return min(fits, key=lambda p: p.excess_nll)
    keeps = [p for p in points if p.excess_nll <= (options.max_drop or 0)]
    if not keeps:
        best = min(points, key=lambda p: p.excess_nll)
        raise UsageError(
            f"--max-drop {options.max_drop}: the best plan still loses "
            f"{best.excess_nll:.4f} nats at {best.bits:.2f} bits",
            f"allow more, or add {SPARED} to --formats",
        )
    return min(keeps, key=lambda p: (p.bits, p.excess_nll))


def _site_plan(setting: _Setting, chosen: Point, options: Options) -> SitePlan:
    formats: dict[str, SiteFormat | None] = {}
    channels = {}
    for key, name in chosen.proposal.choice.items():
        site = setting.layout.by_key[key]
        fmt = formats[key] = site_format(setting.jobs, site, name)
        if fmt is not None and fmt.branch is not None:
            channels[key] = tuple(setting.jobs[name].channels[key].tolist())
    return SitePlan(
        formats,
        channels,
        options.scale_rule,
        setting.source.weights_digest(),
        next((j.statistics_digest for j in setting.jobs.values() if j.statistics_digest), None),
        notes={
            "name": chosen.proposal.name,
            "bits": chosen.bits,
            "excess_nll": chosen.excess_nll,
            "stderr": chosen.stderr,
            "data": setting.description,
            "options": {k: v for k, v in options.__dict__.items() if v is not None},
            "versions": versions(),
        },
    )


def _write(plan: SitePlan, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".new")
    temporary.write_bytes(plan.encode())
    temporary.replace(output)
