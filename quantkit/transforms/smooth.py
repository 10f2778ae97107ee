"""Smooth: move range from activations into the weights that meet them, by exact diagonal scales.

    attn_in, mlp_in   norm gain / s   ->   all readers * s (a router too)
    mlp_out           up rows / s     ->   down * s
    attn_out          v rows / s      ->   o * s, one scale for the heads that share a KV head

SmoothQuant (2211.10438); quantile and learned scales after 2606.09927. Each site's scale is kept in
the unfinished output as soon as it is found, so an interrupted run continues behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from quantkit import console
from quantkit.calibrate import store
from quantkit.calibrate.hidden import write_durably
from quantkit.calibrate.layerwise import choose_device
from quantkit.calibrate.parallel import Ranks, joined
from quantkit.checkpoint.manifest import online_hadamards
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import Target, begin_step, open_source, output_of
from quantkit.data.tokens import TokenBatch, load_tokens
from quantkit.errors import InputRejected, UsageError
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import KINDS, ModelLayout, Site
from quantkit.transforms import carry, fold
from quantkit.transforms.decide import METHODS, Decision, Method, decide
from quantkit.transforms.hadamard import largest_size
from quantkit.transforms.observe import Observed, observe
from quantkit.transforms.rotate import DTYPES, RotateOptions
from quantkit.transforms.simulate import Simulation

SCHEMES = ("mxfp4", "nvfp4", "mxfp8", "osc", "int4")
REPORT = "smoothing.json"


@dataclass(frozen=True)
class SmoothOptions:
    """What the user chose."""

    method: Method = field(default_factory=Method)
    sites: tuple[str, ...] = KINDS
    scheme: str = "mxfp4"  # what will be packed: the rounding that errors are measured with
    scale_rule: str = "even"
    hadamard: str = "auto"  # the online Hadamard that will follow: a size, full, none, recorded
    data: str | None = None  # default: what the checkpoint was calibrated with
    samples: int = 16
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class SmoothResult:
    """What was written and, by site key, what was decided."""

    output: Path
    decisions: Mapping[str, Decision]
    layout: ModelLayout

    def to_json(self) -> dict[str, Any]:
        """For --json: means over the sites of each kind."""
        kinds = {}
        for kind in KINDS:
            mine = [d for s in self.layout.sites if (d := self._of(s)) and s.kind == kind]
            if mine:
                judged = [d for d in mine if d.before is not None and d.after is not None]
                kinds[kind] = {
                    "sites": len(mine),
                    "smoothed": sum(d.scale is not None for d in mine),
                    "error_before": _mean([d.before for d in judged]),
                    "error_after": _mean([d.after for d in judged]),
                }
        return {"output": str(self.output), "kinds": kinds}

    def _of(self, site: Site) -> Decision | None:
        return self.decisions.get(site.key)

    def text(self) -> str:
        """For people."""
        rows = [
            [kind, row["sites"], row["smoothed"], *map(_shown, list(row.values())[2:])]
            for kind, row in self.to_json()["kinds"].items()
        ]
        headers = ["kind", "sites", "smoothed", "error before", "error after"]
        return f"wrote {self.output}\n{console.table(headers, rows)}"


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@dataclass(frozen=True)
class Setting:
    """What is known before the first site: input, output (first process), text and statistics."""

    source: Checkpoint
    layout: ModelLayout
    output: Path | None
    device: torch.device
    statistics: store.Statistics | None
    tokens: TokenBatch | None


def opened(
    checkpoint: str | Path | None,
    options: SmoothOptions,
    target: Target,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> Setting:
    """Open and check everything a run needs. Raises what `smooth` does."""
    source = open_source(checkpoint)
    if "quantization_config" in source.config:
        raise InputRejected(
            f"{source.path}: is packed already", "smooth the checkpoint it was made from"
        )
    layout = describe(source.config, source.tensors)
    _check(options)
    device = choose_device(options.device, ranks)
    output = output_of(source, "smoothed", target) if ranks.first else None
    statistics = store.load_statistics(source) if (source.path / store.FILE).exists() else None
    rules = options.method.name in ("max", "quantile")
    if rules and not options.method.check and statistics is None:
        raise UsageError(f"{source.path}: no statistics", f"run: quantkit calibrate {source.path}")
    tokens = None
    if options.method.check or not rules:
        tokens = _tokens(source, options)
        console.note(f"data: {tokens.description}")
    return Setting(source, layout, output, device, statistics, tokens)


def smooth(
    checkpoint: str | Path | None, options: SmoothOptions, target: Target
) -> SmoothResult | None:
    """Write the smoothed checkpoint; its function is the input's.

    Under a launcher of several processes each decides its share of the sites; the first one writes
    and alone gets a result. Raises InputRejected for packed checkpoints, stale statistics and bad
    data, UsageError for options that make no sense.
    """
    fold.return_freed_memory()
    with joined() as ranks:
        setting = opened(checkpoint, options, target, ranks)
        if ranks.first:
            return _write(setting, options, target, ranks)
        folder = Path(ranks.broadcast())
        run = Run(
            setting.source,
            folder,
            setting.layout,
            options,
            setting.statistics,
            setting.device,
            ranks,
        )
        run.decisions(setting.tokens)
        return None


def _write(setting: Setting, options: SmoothOptions, target: Target, ranks: Ranks) -> SmoothResult:
    source, layout = setting.source, setting.layout
    tokens, statistics = setting.tokens, setting.statistics
    with begin_step(
        "smooth",
        source,
        options=_recorded(options),
        suffix="smoothed",
        target=target,
        seed=options.seed,
        also={
            "tokens": tokens.digest if tokens else None,
            "statistics": statistics.digest if statistics else None,
        },
    ) as step:
        scratch = step.writer.scratch
        ranks.broadcast(str(scratch))
        run = Run(source, scratch, layout, options, statistics, setting.device, ranks)
        decisions = run.decisions(tokens)
        scales = {key: d.scale for key, d in decisions.items() if d.scale is not None}
        edits: fold.Edits = {}
        for key, scale in scales.items():
            fold.add(edits, fold.scale(layout.by_key[key], scale))
        dtype = DTYPES[options.dtype] if options.dtype else None
        fold.write_edited(step.writer, source, edits, dtype)
        if dtype is not None:
            config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
            text = json.dumps(config | {"dtype": options.dtype}, indent=2)
            step.writer.write_file("config.json", (text + "\n").encode())
        digest = carry.carry_statistics(step, scales, counts=run.counts())
        report = {key: decision.record() for key, decision in decisions.items()}
        step.writer.write_file(REPORT, (json.dumps(report, indent=1) + "\n").encode())
        step.notes |= {"smoothed": len(scales), "sites": len(decisions)}
        output = step.finish(statistics_digest=digest)
    return SmoothResult(output, decisions, layout)


class Run:
    """One smoothing run: finds the scale of every site, and finds again what was found before.

    Scales lie in `scratch`, site by site: an interrupted run and other processes find them there.
    """

    def __init__(
        self,
        source: Checkpoint,
        scratch: Path | None,
        layout: ModelLayout,
        options: SmoothOptions,
        statistics: store.Statistics | None,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        self.source, self.scratch = source, scratch
        self.layout, self.options = layout, options
        self.statistics, self.device, self.ranks = statistics, device, ranks
        self.sites = [site for site in layout.sites if site.kind in options.sites]
        self.online = recorded_hadamards(source)

    def decisions(self, tokens: TokenBatch | None) -> dict[str, Decision]:
        """Decide every site, in the order of the model."""
        found = {s.key: d for s in self.sites if (d := self._kept(s.key)) is not None}
        # What was found is the first process's to say: others may already be adding to it.
        known = self.ranks.broadcast(list(found))
        left = [site for site in self.sites if site.key not in known]
        if found and left:
            console.note(f"continuing: the scales of {len(found)} sites are known")
        # By layer too, else one process of four would get every down projection.
        rank, size = self.ranks.rank, self.ranks.size
        mine = [site for i, site in enumerate(left) if (i + site.layer) % size == rank]
        with console.progress("smooth", len(mine)) as progress:
            for site, observed in self._observed(mine, tokens):
                found[site.key] = self._decide(site, observed)
                progress.advance(detail=site.key)
        self.ranks.barrier()
        if self.ranks.first:
            for site in left:
                if site.key not in found and (decided := self._kept(site.key)) is not None:
                    found[site.key] = decided
        return {site.key: found[site.key] for site in self.sites if site.key in found}

    def _observed(self, left: list[Site], tokens: TokenBatch | None) -> Any:
        if tokens is None or not left:
            yield from ((site, None) for site in left)
            return
        keys = {site.key for site in left}
        stored = self.source.tensors[self.layout.embedding].dtype
        narrow = stored == torch.float16 and self.device.type == "cpu"  # emulated there
        runner = BlockRunner(
            self.source,
            self.layout,
            device=self.device,
            dtype=torch.float32 if narrow else None,
        )
        last = max(site.layer for site in left)
        for _, inputs in observe(runner, tokens.ids, lambda site: site.key in keys, last):
            while inputs:
                observed = inputs.pop(0)
                yield observed.site, observed

    def _decide(self, site: Site, observed: Observed | None) -> Decision:
        decision = decide(
            self.source,
            site,
            self.options.method,
            self.simulation(site),
            observed=observed,
            statistics=self.statistics,
        )
        self._keep(site.key, decision, observed)
        return decision

    def counts(self) -> dict[str, dict[str, Tensor]]:
        """The counts of group maxima of the sites whose smoothed inputs were seen."""
        found = {}
        for site in self.sites:
            tensors = load_file(self._path(site.key))
            tensors.pop("scale", None)
            if tensors:
                found[site.key] = tensors
        return found

    def simulation(self, site: Site) -> Simulation:
        """What packing will do to the site's operands."""
        scheme, asked = self.options.scheme, self.options.hadamard
        size: int | None = None
        if asked == "full":
            size = largest_size(site.width)
        elif asked.isdigit() and int(asked):
            size = int(asked)
        elif asked == "recorded" or (asked == "auto" and self.online):
            size = self.online.get(site.key, self.online.get(site.kind))
        elif asked == "auto":
            size = _usual_hadamard(scheme, site)
        if size is not None and site.width % size:
            size = largest_size(site.width)
        if scheme != "osc":
            return Simulation(scheme, scheme, self.options.scale_rule, size)
        if site.kind == "mlp_out":
            return Simulation("mxfp8", "mxfp8", self.options.scale_rule, size)
        return Simulation("mxfp4", "mxfp4", self.options.scale_rule, size, group=32)

    def _path(self, key: str) -> Path:
        assert self.scratch is not None
        return self.scratch / f"{key}.safetensors"

    def _keep(self, key: str, decision: Decision, observed: Observed | None) -> None:
        tensors = {}
        if decision.scale is not None:
            tensors["scale"] = decision.scale.contiguous()
            if observed is not None and self.statistics is not None:
                scale = decision.scale.to(observed.fit.device)
                tensors |= carry.counted(torch.cat([observed.fit, observed.held]) / scale)
        data = save(tensors, {"decision": json.dumps(decision.record())})
        write_durably(self._path(key), data)

    def _kept(self, key: str) -> Decision | None:
        path = self._path(key)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            scale: Tensor | None = file.get_tensor("scale") if "scale" in names else None
            return Decision(scale, **json.loads(file.metadata()["decision"]))


def _usual_hadamard(scheme: str, site: Site) -> int | None:
    """What `rotate` does for a scheme when it is asked for nothing else."""
    if scheme in ("mxfp4", "osc"):
        return RotateOptions().block
    if scheme == "int4" and site.kind == "mlp_out":
        return largest_size(site.width)
    return None


def recorded_hadamards(source: Checkpoint) -> dict[str, int]:
    """Sizes of the online Hadamards that earlier steps recorded, by site kind or key."""
    forms = online_hadamards(source.manifest)
    return {key: next(iter(form.values())) if form else 1 for key, form in forms.items()}


def _check(options: SmoothOptions) -> None:
    method = options.method
    if method.name not in METHODS:
        raise UsageError(f"--method {method.name}: one of {', '.join(METHODS)}")
    if not 0 <= method.alpha <= 1:
        raise UsageError(f"--alpha {method.alpha}: a number from 0 to 1")
    if not 0.5 <= method.quantile <= 1:
        raise UsageError(f"--quantile {method.quantile}: a number from 0.5 to 1")
    if not options.sites or set(options.sites) - set(KINDS):
        raise UsageError(f"--sites: some of {','.join(KINDS)}")
    if options.scheme not in SCHEMES:
        raise UsageError(f"--scheme {options.scheme}: one of {', '.join(SCHEMES)}")
    named = ("auto", "recorded", "none", "full")
    if options.hadamard not in named and not options.hadamard.isdigit():
        raise UsageError(f"--hadamard {options.hadamard}: {', '.join(named)} or a size")
    if options.samples < 2:
        raise UsageError("--samples: at least two, one to fit on and one to judge on")
    if options.dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {options.dtype}: one of {', '.join(DTYPES)}")


def _tokens(source: Checkpoint, options: SmoothOptions) -> TokenBatch:
    calibrated = source.manifest.last("calibrate") if source.manifest else None
    recorded = calibrated.options if calibrated else {}
    data = options.data or recorded.get("data") or "wikitext"
    seq_len = options.seq_len or (None if options.data else recorded.get("seq_len"))
    return load_tokens(
        data, source.path, samples=options.samples, seq_len=seq_len, seed=options.seed
    )


def _recorded(options: SmoothOptions) -> dict[str, Any]:
    method = options.method
    recorded: dict[str, Any] = {
        "method": method.name,
        "sites": list(options.sites),
        "scheme": options.scheme,
        "scale_rule": options.scale_rule,
        "hadamard": options.hadamard,
        "data": options.data,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
    }
    if method.name in ("max", "quantile"):
        recorded |= {"alpha": method.alpha, "check": method.check}
    if method.name == "quantile":
        recorded["quantile"] = method.quantile
    if method.name == "learned":
        recorded["training"] = vars(method.training)
    return recorded
