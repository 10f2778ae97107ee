"""Calibrate: run all samples through one block after another and measure every site's inputs.

Memory holds one block (and the next one, being read), the statistics of its sites and the hidden
states of the samples, which go to a file past a limit. The first process writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from quantkit import console
from quantkit.calibrate import store
from quantkit.calibrate.accumulators import Hits, Scratch, SiteAccumulator
from quantkit.calibrate.hidden import HiddenStates, kept_boundary, write_durably
from quantkit.calibrate.parallel import Ranks, joined
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import Target, begin_step, open_source, output_of, versions
from quantkit.data.tokens import TokenBatch, load_tokens
from quantkit.errors import InputRejected, QuantkitError, UsageError
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import ModelLayout, Site

ALPHA = 5.0  # threshold of an outlier, in means of |x| (OSC, section 3)
MAX_TAIL = 1024  # largest |x| kept per channel, whatever the number of tokens
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    data: str
    samples: int = 64
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    activation_memory: int = 10**9
    every_expert: bool = False
    min_expert_tokens: int = 64
    tail_quantile: float = 0.99  # quantiles of |x| from here on are exact, up to MAX_TAIL values


@dataclass(frozen=True)
class Result:
    """What was made: the output and a summary per kind of site."""

    output: Path
    statistics: store.Statistics
    layout: ModelLayout
    description: str
    starved: tuple[str, ...]


def calibrate(checkpoint: str | Path | None, options: Options, target: Target) -> Result | None:
    """Measure a checkpoint's activations; gives the same checkpoint with its statistics.

    Under a launcher of several processes the samples are split and only the first process gets a
    result. Raises UsageError, InputRejected (bad weights, data or activations) or QuantkitError.
    """
    with joined() as ranks:
        source = open_source(checkpoint)
        if ranks.first:
            output_of(source, "calibrated", target)  # refuse before the data is read
        run = prepare(source, options, ranks)
        console.note(f"data: {run.tokens.description}")
        if not ranks.first:
            order = ranks.broadcast()
            if order is None:
                raise QuantkitError("the first process of this run gave up", "see its message")
            run.all_blocks(Path(order))
            return None
        try:
            return _write(run, target)
        except BaseException:
            if not run.begun:
                ranks.broadcast(None)
            raise


def prepare(source: Checkpoint, options: Options, ranks: Ranks) -> Run:
    """Check what is asked for and read the data; nothing is computed or written yet."""
    device = choose_device(options.device, ranks)
    if "quantization_config" in source.config:
        raise InputRejected(
            f"{source.path}: is quantized already", "calibrate the checkpoint it was made from"
        )
    layout = describe(source.config, source.tensors)
    dtype = _compute_dtype(options.dtype, source, layout, device)
    tokens = load_tokens(
        options.data,
        source.path,
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    return Run(source, layout, tokens, options, device, dtype, ranks)


def _write(run: Run, target: Target) -> Result:
    options, tokens = run.options, run.tokens
    recorded = {
        "data": options.data,
        "samples": len(tokens.ids),
        "seq_len": tokens.ids.shape[1],
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": run.device.type,
        "every_expert": options.every_expert,
        "tail_quantile": options.tail_quantile,
        "min_expert_tokens": options.min_expert_tokens,
    }
    with begin_step(
        "calibrate",
        run.source,
        options=recorded,
        suffix="calibrated",
        target=target,
        seed=options.seed,
        also={"tokens": tokens.digest},
    ) as step:
        run.begun = True
        run.ranks.broadcast(str(step.writer.scratch))
        run.all_blocks(step.writer.scratch)
        layers = [_layer_file(step.writer.scratch, i) for i in range(run.layout.n_layers)]
        meta = recorded | {
            "weights_digest": step.input_digest,
            "tokens_digest": tokens.digest,
            "data": tokens.description,
            "seed": options.seed,
            "alpha": ALPHA,
            "versions": versions(),
        }
        step.writer.write_file(store.FILE, store.combine(layers, meta))
        statistics = store.open_statistics(step.writer.side_file(store.FILE))
        starved = _starved(statistics, run.layout)
        step.writer.keep_rest()
        step.notes |= {"data": tokens.description, "starved_experts": len(starved)}
        if run.layout.unmatched:
            step.notes["unmatched_tensors"] = len(run.layout.unmatched)
        digest = statistics.digest
        output = step.finish(statistics_digest=digest)
    statistics = store.open_statistics(output / store.FILE)
    return Result(output, statistics, run.layout, tokens.description, starved)


class Run:
    """One calibration: what it works on, and the loop over the blocks."""

    def __init__(
        self,
        source: Checkpoint,
        layout: ModelLayout,
        tokens: TokenBatch,
        options: Options,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.source, self.layout, self.tokens, self.options = source, layout, tokens, options
        self.device, self.dtype, self.ranks = device, dtype, ranks
        self.begun = False
        self.batches = batch_ranges(tokens.ids.shape[0], tokens.ids.shape[1], device)
        self.mine = ranks.share(len(self.batches))
        total = tokens.ids.numel()
        self.k = min(math.ceil((1 - options.tail_quantile) * total) + 1, MAX_TAIL, total)

    def all_blocks(self, folder: Path) -> None:
        """Measure every block; statistics go to `folder`, where an earlier run may have left some.

        Raises InputRejected naming the layer when weights or activations are not finite.
        """
        shape = (self.tokens.ids.shape[1], self.layout.hidden)
        states = HiddenStates(
            folder, self.batches, self.mine, shape, self.dtype, self.options.activation_memory
        )
        runner = BlockRunner(self.source, self.layout, device=self.device, dtype=self.dtype)
        boundary = self.ranks.broadcast(kept_boundary(folder) if self.ranks.first else None)
        start = boundary or 0
        if start == self.layout.n_layers:
            return  # only the output was left to be put together
        runner.prefetch(start)
        if boundary is None:
            mine = [self.tokens.ids[slice(*self.batches[b])] for b in self.mine]
            for b, embedded in zip(self.mine, runner.embed_all(mine), strict=True):
                states.put(0, b, embedded)
        else:
            states.load(start)
            console.note(f"continuing behind block {start - 1}")
        try:
            with console.progress("calibrate", self.layout.n_layers - start) as progress:
                for i in range(start, self.layout.n_layers):
                    self._block(runner, states, i, folder)
                    progress.advance(detail=f"block {i}")
        finally:
            states.close()

    def _block(self, runner: BlockRunner, states: HiddenStates, i: int, folder: Path) -> None:
        block = runner.load(i)
        if i + 1 < self.layout.n_layers:
            runner.prefetch(i + 1)
        found: dict[str, SiteAccumulator] = {}
        scratch = Scratch()
        for b in self.mine:
            hidden = states.get(i, b).to(self.device, non_blocking=True)
            states.put(i + 1, b, self.one_batch(runner, block, i, hidden, found, scratch))
        del block
        state = self.measured(i, found)
        if self.ranks.first:
            write_durably(_layer_file(folder, i), save(state))
        states.reach(i + 1)
        last = i + 1 == self.layout.n_layers
        # If to one process, then to all: the files of one that spills are half overwritten soon.
        if last or any(self.ranks.all_gather(states.worth_keeping())):
            if not last:  # nobody reads the last block's output
                states.keep()
            self.ranks.barrier()
            if self.ranks.first:
                states.mark()

    def one_batch(
        self,
        runner: BlockRunner,
        block: nn.Module,
        i: int,
        hidden: torch.Tensor,
        found: dict[str, SiteAccumulator],
        scratch: Scratch,
    ) -> torch.Tensor:
        """Run one batch through block `i`, measuring into `found`; gives the block's output."""

        def watch(site: Site, x: torch.Tensor) -> None:
            if site.key not in found:
                room = BATCH_TOKENS[self.device.type] // (1 if site.expert is None else 8)
                empty = SiteAccumulator.empty(site.key, site.width, self.dtype, self.k, room)
                found[site.key] = empty
            found[site.key].update(x, scratch)

        return runner.capture(block, i, hidden, watch, every_expert=self.options.every_expert)

    def measured(self, i: int, found: Mapping[str, SiteAccumulator]) -> dict[str, torch.Tensor]:
        """Merge one block's statistics over the processes; the first gets them, by name."""
        parts = self.ranks.all_gather({key: acc.magnitude for key, acc in found.items()})
        hits: dict[str, Hits] = {}
        for key, acc in found.items():
            magnitude = _merged([part[key] for part in parts if key in part])
            hits[key] = Hits.of(acc.maxima, ALPHA * magnitude.mean())
            acc.maxima.keys.clear()
        gathered = self.ranks.gather((dict(found), hits))
        state: dict[str, torch.Tensor] = {}
        if not self.ranks.first:
            return state
        for site in self.layout.layer_sites(i):
            accs = [part[0][site.key] for part in gathered if site.key in part[0]]
            if not accs:
                state[f"{site.key}/count"] = torch.tensor(0)
                continue
            acc = _merged(accs)
            count = acc.moments.count
            k = min(math.ceil((1 - self.options.tail_quantile) * count) + 1, self.k)
            counted = _merged([part[1][site.key] for part in gathered if site.key in part[1]])
            for name, tensor in (acc.state_dict(k) | counted.state_dict()).items():
                state[f"{site.key}/{name}"] = tensor.contiguous()
        return state


def _merged(parts: Sequence[Any]) -> Any:
    joined_parts = parts[0]
    for part in parts[1:]:
        joined_parts = joined_parts.merge(part)
    return joined_parts


def batch_ranges(samples: int, seq_len: int, device: torch.device) -> list[tuple[int, int]]:
    """Cut the samples into batches [first, last): the same whoever computes them."""
    size = max(BATCH_TOKENS[device.type] // seq_len, 1)
    return [(first, min(first + size, samples)) for first in range(0, samples, size)]


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """Turn `--device` into a device: `auto` is the GPU of this process when there is one."""
    local = ranks.local if ranks else 0
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(f"--device {name}: give cpu, cuda or auto")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: no NVIDIA GPU is usable here", "give --device cpu")
    return torch.device("cuda", local % torch.cuda.device_count())


def _compute_dtype(
    name: str, source: Checkpoint, layout: ModelLayout, device: torch.device
) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"--dtype {name}: give auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    stored = source.tensors[layout.embedding].dtype
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32  # half precision is emulated there, and overflows
    return stored if stored in DTYPES.values() else torch.float32


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


def _starved(statistics: store.Statistics, layout: ModelLayout) -> tuple[str, ...]:
    """Experts that saw too few tokens."""
    keys = [site.key for site in layout.sites if site.expert is not None]
    return tuple(key for key in keys if not statistics.has(key))
