"""Pack block by block on calibration text: every weight is rounded for the inputs it will meet.

The hidden states of all samples go through one block after another. Inside a block the sites are
packed in the order the data meets them, each on inputs made by the packed linears before it, and
the packed block makes the next one's inputs. Memory holds one block, the second moments of its
sites and the hidden states (in a file past a limit); an interrupted run continues behind the last
block whose states were kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import console
from quantkit.calibrate.hidden import HiddenStates, kept_boundary
from quantkit.calibrate.layerwise import batch_ranges, choose_device
from quantkit.checkpoint.step import OpenStep
from quantkit.data.tokens import TokenBatch
from quantkit.kernels import reference
from quantkit.model.block import BlockRunner
from quantkit.model.sites import Linear, Site
from quantkit.pack.group import (
    fused_groups,
    is_done,
    names_of,
    tensors_of_group,
    weights_of_group,
)
from quantkit.pack.job import Job, PackOptions
from quantkit.pack.modules import PackedBlock, SharedInput
from quantkit.pack.rounding import Rounded, round_for_inputs
from quantkit.pack.rtn import global_divisor
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors

STATES_IN_MEMORY = 2 * 10**9


class Reached(Exception):
    """Ends a forward pass behind the last site that is wanted."""


@dataclass
class Sequential:
    """One run over the blocks: what it works on."""

    step: OpenStep
    job: Job
    options: PackOptions
    tokens: TokenBatch

    def __post_init__(self) -> None:
        job = self.job
        self.device = choose_device(self.options.device)
        dtype = job.source.tensors[job.layout.embedding].dtype
        if dtype == torch.float16:
            dtype = torch.float32  # block scales leave its range
        self.runner = BlockRunner(job.weights, job.layout, device=self.device, dtype=dtype)
        ids = self.tokens.ids
        self.batches = batch_ranges(ids.shape[0], ids.shape[1], self.device)
        self.states = HiddenStates(
            self.step.writer.scratch,
            self.batches,
            range(len(self.batches)),
            (ids.shape[1], job.layout.hidden),
            dtype,
            STATES_IN_MEMORY,
        )

    def run(self) -> int:
        """Pack every block; returns the number of linears."""
        layout, count = self.job.layout, 0
        start = kept_boundary(self.step.writer.scratch) or 0
        if start:
            self.states.load(start)
            console.note(f"continuing behind block {start - 1}")
        else:
            for b, (first, last) in enumerate(self.batches):
                self.states.put(0, b, self.runner.embed(self.tokens.ids[first:last]))
        try:
            with console.progress("pack", layout.n_layers - start) as progress:
                for layer in range(start, layout.n_layers):
                    self._block(layer)
                    progress.advance(detail=f"block {layer}")
        finally:
            self.states.close()
        for site in layout.sites:
            fmt = self.job.format(site)
            if fmt is not None:
                count += len(site.linears)
                for linear in site.linears:
                    self.step.writer.drop(linear.tensor)
        return count

    def _block(self, layer: int) -> None:
        block = PackedBlock(self.runner, layer)
        for stage in stages(self.job.layout.layer_sites(layer)):
            wanted = [(site, fmt) for site in stage if (fmt := self.job.format(site)) is not None]
            unpacked = [pair for pair in wanted if not self._all_done(*pair)]
            moments = self._second_moments(block, layer, unpacked) if unpacked else {}
            for site, fmt in wanted:
                for group in fused_groups(site):
                    if not is_done(self.step.writer, fmt, group):
                        self._pack_group(site, fmt, group, moments[site.key])
                    self._install(block, site, fmt, group)
            block.settle()
        last = layer + 1 == self.job.layout.n_layers
        for b in range(len(self.batches)):
            if not last:  # nobody reads the last block's output
                states = self.states.get(layer, b).to(self.device)
                with torch.no_grad():
                    self.states.put(layer + 1, b, self.runner.forward(block.module, states))
        if not last and self.states.worth_keeping():
            self.step.writer.flush()
            self.states.keep()
            self.states.mark()

    def _all_done(self, site: Site, fmt: SiteFormat) -> bool:
        return all(is_done(self.step.writer, fmt, group) for group in fused_groups(site))

    def _second_moments(
        self, block: PackedBlock, layer: int, sites: Sequence[tuple[Site, SiteFormat]]
    ) -> dict[str, Tensor]:
        """Mean outer product of each site's quantized inputs, branch columns last: float32."""
        formats = {site.key: fmt for site, fmt in sites}
        channels = {
            key: self.job.channels[key].to(self.device)
            for key in formats
            if key in self.job.channels
        }
        final = sites[-1][0].key if sites[-1][0].expert is None else None
        moments = {
            site.key: torch.zeros(
                (site.width + len(channels.get(site.key, ())),) * 2, device=self.device
            )
            for site, _ in sites
        }
        counts = dict.fromkeys(moments, 0)

        def watch(site: Site, x: Tensor) -> None:
            if site.key in formats:
                operand = self._operand(site, formats[site.key], x, channels.get(site.key))
                add_outer(moments[site.key], operand)
                counts[site.key] += len(x)
            if site.key == final:
                raise Reached

        for b in range(len(self.batches)):
            states = self.states.get(layer, b).to(self.device)
            try:
                self.runner.capture(block.module, layer, states, watch)
            except Reached:
                continue
        for key, count in counts.items():
            moments[key] /= max(count, 1)
        return moments

    def _operand(self, site: Site, fmt: SiteFormat, x: Tensor, channels: Tensor | None) -> Tensor:
        """What the packed linears multiply, [tokens, in + k]: the branch's columns at the end."""
        divisor = self.job.divisors.get(site.key)
        divisor = divisor if divisor is None else divisor.to(self.device)
        operand = reference.input_operand(x, fmt, self.job.scheme.scale_rule, channels, divisor)
        if channels is None or fmt.hadamard_size:
            return operand
        return torch.cat([operand.index_fill(1, channels, 0), operand[:, channels]], 1)

    def _pack_group(
        self, site: Site, fmt: SiteFormat, group: Sequence[Linear], moments: Tensor
    ) -> None:
        weights = weights_of_group(self.job, site, fmt, group)
        rests = [rest.to(self.device) for rest, _ in weights]
        columns = [part.float() for _, part in weights if part is not None]
        rounded = round_for_inputs(
            torch.cat(rests),
            torch.cat(columns).to(self.device) if columns else None,
            fmt,
            moments,
            self.job.scheme.scale_rule,
            global_divisor(rests) if fmt.weights == "nvfp4" else None,
            self.options.four_over_six,
        )
        self._write(site, fmt, group, rounded.split([len(rest) for rest in rests]))

    def _write(
        self, site: Site, fmt: SiteFormat, group: Sequence[Linear], rounded: Sequence[Rounded]
    ) -> None:
        parts = []
        for one in rounded:
            branch = {}
            if one.branch is not None:
                branch = branch_tensors(one.branch.cpu(), self.job.channels[site.key], fmt)
            parts.append(one.encode() | branch)
        self.step.writer.write_group(tensors_of_group(self.job, site, fmt, group, parts))

    def _install(
        self, block: PackedBlock, site: Site, fmt: SiteFormat, group: Sequence[Linear]
    ) -> None:
        """Let the block compute with the bytes that were written."""
        writer = self.step.writer
        shared = SharedInput(fmt, self.job.scheme.scale_rule)
        for linear in group:
            found = {n: writer.read(n).to(self.device) for n in names_of(fmt, linear)}
            tensors = {name.rpartition(".")[2]: tensor for name, tensor in found.items()}
            block.install(linear, tensors, shared)


def stages(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites that can be packed at the same time, in order: one each, all experts' together."""
    experts = [site for site in sites if site.expert is not None]
    for site in sites:
        if site.expert is None:
            yield [site]
    if experts:
        yield experts


def add_outer(total: Tensor, x: Tensor) -> None:
    """total += x^T x in float32, for x [tokens, n] whose values bfloat16 holds exactly."""
    x = x.float()
    total.addmm_(x.t(), x)
