"""Pack a checkpoint: linear by linear, everything else taken along unchanged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import console
from quantkit.calibrate.layerwise import choose_device
from quantkit.calibrate.parallel import Ranks, joined
from quantkit.checkpoint.measure import sizes
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.step import OpenStep, Target, begin_step, open_source, output_of
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import UsageError
from quantkit.export import compressed_tensors
from quantkit.pack.balance import EditedCheckpoint
from quantkit.pack.ends import pack_ends
from quantkit.pack.job import Job, PackOptions, prepare
from quantkit.pack.plain import help_packing, pack_sites
from quantkit.pack.recipes import resolved
from quantkit.pack.rounding import FROM_INPUTS
from quantkit.pack.scheme import Scheme

if TYPE_CHECKING:
    from quantkit.data.tokens import TokenBatch


GPTQ_WINDOWS = 32  # of the text: 32 thousand tokens for second moments of some thousand columns


@dataclass(frozen=True)
class PackResult:
    """What was packed and where it is."""

    output: Path
    scheme: Scheme
    linears: int
    quant_method: str
    bits: dict[str, float]  # per weight by site kind, counted from the files
    outside: dict[str, float]  # per weight of the embedding and of a head of its own
    model_bits: float  # per parameter of the whole model

    def as_json(self) -> dict[str, Any]:
        """One object for --json."""
        return {
            "output": str(self.output),
            "scheme": self.scheme.name,
            "scale_rule": self.scheme.scale_rule,
            "quant_method": self.quant_method,
            "linears": self.linears,
            "bits_per_weight": self.bits,
            "bits_outside_blocks": self.outside,
            "bits_per_parameter": self.model_bits,
        }

    def as_text(self) -> str:
        """Format and bits by kind of site, and where the checkpoint is."""
        rows = []
        for kind, bits in self.bits.items():
            fmt = self.scheme.sites.get(kind)
            words = "" if kind == "all" else fmt.words() if fmt is not None else "as it is"
            others = sum(key.endswith(f".{kind}") for key in self.scheme.overrides)
            rows.append((kind, words + (f" ({others} differ)" if others else ""), f"{bits:.3f}"))
        for name, fmt in (("embedding", self.scheme.embedding), ("head", self.scheme.head)):
            if fmt is not None and name in self.outside:
                rows.append((name, fmt.weights, f"{self.outside[name]:.3f}"))
        return "\n".join(
            [
                console.table(("site", "format", "bits/weight"), rows),
                f"{self.linears} linears packed, scale rule {self.scheme.scale_rule}, "
                f"read as {self.quant_method}",
                f"{self.model_bits:.3f} bits per parameter of the whole model",
                f"wrote {self.output}",
            ]
        )


def pack(checkpoint: str | Path | None, options: PackOptions, target: Target) -> PackResult | None:
    """Write a packed checkpoint beside its source, holding one fused group of weights at a time.

    Under a launcher of several processes each rounds its share of the groups; on text each also
    carries its share of the samples (learned rounding is one process's work). The first one writes
    and alone gets a result. Raises InputRejected for a packed or damaged input, NaN weights, a
    stale plan or stale statistics, and widths that do not fit; UsageError for options that do not
    go together.
    """
    with joined() as ranks:
        return _pack(checkpoint, resolved(options), target, ranks)


def _pack(
    checkpoint: str | Path | None, options: PackOptions, target: Target, ranks: Ranks
) -> PackResult | None:
    source = open_source(checkpoint)
    on_text = options.rounding in FROM_INPUTS and options.dtype is None
    if ranks.first:
        output_of(source, suffix(options), target)  # refused before anything is computed
    if on_text and options.rounding == "learned":
        if not ranks.first:
            return None
        if ranks.size > 1:
            others = f"{ranks.size - 1} of {ranks.size} processes have"
            console.warn(f"--rounding learned is one process's work: {others} nothing to do")
        ranks = Ranks(local=ranks.local)
    job = prepare(source, options)
    tokens = rounding_text(source, options) if on_text else None
    if not ranks.first:
        if tokens is None:
            help_packing(job, options, ranks)
        else:
            _sequential(job, options, tokens, ranks)
        return None
    config = packed_config(job, options)
    method = config["quantization_config"]["quant_method"]
    with begin_step(
        "pack",
        source,
        options=options.record(),
        suffix=suffix(options),
        target=target,
        seed=options.seed if tokens else None,
        also={
            "plan": job.plan_digest,
            "statistics": job.statistics_digest,
            "tokens": tokens.digest if tokens else None,
        },
    ) as step:
        if tokens is not None:
            step.notes["data"] = tokens.description
            linears = _sequential(job, options, tokens, ranks, step.writer)
        else:
            linears = pack_sites(step, job, options, ranks)
        pack_ends(step.writer, job, choose_device(options.device, ranks))
        _write_edited(step, job)
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
    outside = {part.kind: part.bits for part in written.outside}
    return PackResult(
        output, job.scheme, linears, method, bits, outside, round(written.model_bits, 4)
    )


def _sequential(
    job: Job,
    options: PackOptions,
    tokens: TokenBatch,
    ranks: Ranks,
    writer: CheckpointWriter | None = None,
) -> int:
    from quantkit.pack.sequential import Sequential
    from quantkit.pack.shelf import Shelf

    return Sequential(Shelf.shared(ranks, writer), job, options, tokens).run()


def rounding_text(source: Checkpoint, options: PackOptions) -> TokenBatch:
    """The text that gptq and learned round on: `--data`, or what calibration used.

    gptq takes GPTQ_WINDOWS of it unless told otherwise.
    """
    from quantkit.data.tokens import load_tokens

    calibrated = source.manifest.last("calibrate") if source.manifest else None
    recorded = calibrated.options if calibrated else {}
    spec = options.data or recorded.get("data")
    if spec is None:
        raise UsageError(
            f"--rounding {options.rounding} rounds on text",
            f"give --data, or: quantkit calibrate {source.path}",
        )
    samples = options.samples or recorded.get("samples") or 64
    if options.rounding == "gptq" and options.samples is None:
        samples = min(samples, GPTQ_WINDOWS)
    tokens = load_tokens(
        spec,
        source.path,
        samples=samples,
        seq_len=recorded.get("seq_len"),
        seed=options.seed,
    )
    console.note(f"rounding on {tokens.description}")
    return tokens


def _write_edited(step: OpenStep, job: Job) -> None:
    """Gains, biases and linears left unpacked, where balancing changed them."""
    if not isinstance(job.weights, EditedCheckpoint):
        return
    for name in job.weights.edits:
        if not step.writer.dropped(name) and not step.writer.done(name):
            dtype = job.source.tensors[name].dtype
            step.writer.write(name, job.weights.read(name).to(dtype))


def suffix(options: PackOptions) -> str:
    """What the output is called by default: `model-osc`."""
    return options.scheme if options.dtype is None else f"{options.scheme}-{options.dtype}"


def packed_config(job: Job, options: PackOptions) -> dict[str, Any]:
    """The output's `config.json`: compressed-tensors' description where it can say everything."""
    config = dict(job.source.config)
    if job.scheme.ends(job.layout):  # said outright: families differ in what silence means
        config["tie_word_embeddings"] = job.layout.tied
    if compressed_tensors.can_describe(job.scheme, job.layout.tied):
        section = compressed_tensors.write_config(job.scheme, job.layout)
    else:
        section = job.scheme.to_json()
    if options.dtype is not None:
        config["dtype"] = options.dtype
        config.pop("torch_dtype", None)
    return config | {"quantization_config": section}
