"""Pack block by block on calibration text: every weight is rounded for the inputs it will meet.

The hidden states of all samples go through one block after another. Inside a block the sites are
packed in the order the data meets them, each on inputs made by the packed linears before it, and
the packed block makes the next one's inputs. Memory holds one block, the second moments of its
sites and the hidden states (in a file past a limit); an interrupted run continues behind the last
block whose states were kept. Learned rounding carries the exact model's states along as well, and
writes a block when all of it is learned.

Of several processes each carries its share of the samples; second moments are added up, the fused
groups that they allow to round at the same time (a mixture's experts) are rounded one a process,
and everyone's block computes with the tensors of all. The bytes do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit import console
from quantkit.calibrate.hidden import HiddenStates
from quantkit.calibrate.layerwise import batch_ranges, choose_device
from quantkit.data.tokens import TokenBatch
from quantkit.kernels import reference
from quantkit.model.block import BlockRunner
from quantkit.model.sites import Linear, Site
from quantkit.pack.blockwise import Pairs, RoundedGroup, exact_copy, is_expert, learn_block
from quantkit.pack.group import fused_groups, names_of, tensors_of_group, weights_of_group
from quantkit.pack.job import Job, PackOptions
from quantkit.pack.learned import Learning
from quantkit.pack.modules import PackedBlock, SharedInput
from quantkit.pack.moments import SecondMoment, token_scales
from quantkit.pack.plain import Group
from quantkit.pack.rounding import round_for_inputs
from quantkit.pack.rtn import global_divisor
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.separate import branch_tensors
from quantkit.pack.shelf import Shelf

STATES_IN_MEMORY = 2 * 10**9
FEWEST = 64  # tokens that a second moment is made of
OPERANDS_IN_MEMORY = 10**9  # of one block, on a CPU, where making them again takes longest


class Reached(Exception):
    """Ends a forward pass behind the last site that is wanted."""


@dataclass
class Sequential:
    """One run over the blocks: what it works on, and this process's share of the samples."""

    shelf: Shelf
    job: Job
    options: PackOptions
    tokens: TokenBatch

    def __post_init__(self) -> None:
        job = self.job
        self.ranks = self.shelf.ranks
        self.device = choose_device(self.options.device, self.ranks)
        dtype = job.source.tensors[job.layout.embedding].dtype
        if dtype == torch.float16:
            dtype = torch.float32  # block scales leave its range
        self.runner = BlockRunner(job.weights, job.layout, device=self.device, dtype=dtype)
        ids = self.tokens.ids
        self.batches = batch_ranges(ids.shape[0], ids.shape[1], self.device)
        self.mine = self.ranks.share(len(self.batches))
        self.states = self._states("")
        self.learned = self.options.rounding == "learned"
        beside = self.learned or self.options.asymmetric
        self.exact = self._states("exact") if beside else None  # of the unquantized model
        self.learning = Learning(
            steps=Learning.steps if self.options.steps is None else self.options.steps,
            seed=self.options.seed,
        )
        self._waiting: list[RoundedGroup] = []  # to be learned and then written, in order
        self._operands: dict[str, dict[int, Tensor]] = {}  # of this block, by site key and batch
        self._shared: dict[str, SharedInput] = {}
        width = max(
            (sum(s.width for s in job.layout.layer_sites(i) if s.expert is None))
            for i in range(job.layout.n_layers)
        )
        samples = sum(last - first for first, last in (self.batches[b] for b in self.mine))
        size = samples * ids.shape[1] * width * dtype.itemsize
        self._keeping = self.device.type == "cpu" and size <= OPERANDS_IN_MEMORY

    def _states(self, folder: str) -> HiddenStates:
        path = self.shelf.scratch / folder
        path.mkdir(exist_ok=True)
        shape = self.tokens.ids.shape[1], self.job.layout.hidden
        dtype = self.runner.dtype
        return HiddenStates(path, self.batches, self.mine, shape, dtype, STATES_IN_MEMORY)

    def run(self) -> int:
        """Pack every block; returns the number of linears."""
        layout, count, writer = self.job.layout, 0, self.shelf.writer
        start = self.shelf.boundary()
        both = [self.states] if self.exact is None else [self.states, self.exact]
        if start:
            console.note(f"continuing behind block {start - 1}")
            for states in both:
                states.load(start)
        else:
            for b in self.mine:
                embedded = self.runner.embed(self.tokens.ids[slice(*self.batches[b])])
                for states in both:
                    states.put(0, b, embedded)
        try:
            with console.progress("pack", layout.n_layers - start) as progress:
                for layer in range(start, layout.n_layers):
                    learned = self._block(layer)
                    progress.advance(detail=f"block {layer}{learned}")
        finally:
            for states in both:
                states.close()
        for site in layout.sites:
            if self.job.format(site) is not None:
                count += len(site.linears)
                if writer is not None:
                    for linear in site.linears:
                        writer.drop(linear.tensor)
        return count

    def _block(self, layer: int) -> str:
        block, said = PackedBlock(self.runner, layer), ""
        exact = None if self.exact is None else exact_copy(block.module)
        for stage in stages(self.job.layout.layer_sites(layer)):
            formats = [(site, fmt) for site in stage if (fmt := self.job.format(site)) is not None]
            groups = [(site, fmt, group) for site, fmt in formats for group in fused_groups(site)]
            left = self.shelf.undone(groups)
            unpacked = {groups[i][0].key: groups[i][:2] for i in left}
            beside = exact if self.options.asymmetric else None
            found = self._second_moments(block, beside, layer, list(unpacked.values()))
            for (site, fmt, group), tensors in self._packed(groups, left, *found):
                self._install(block, site, fmt, group, tensors)
                if site.kind == "attn_out" and site.key in self._operands:
                    block.replay_attention(site.linears[0])
            del found  # the next stage makes its own
            block.settle()
        if self.exact is not None and exact is not None:
            self._forward(exact, self.exact, layer)
            if self._waiting:
                self._forget_operands()  # other weights make other inputs
                block.restore_attention()
                said = self._learn(block, layer, self.exact)
        if layer + 1 < self.job.layout.n_layers:  # nobody reads the last block's output
            self._forward(block.module, self.states, layer)
        self._forget_operands()
        if layer + 1 == self.job.layout.n_layers:
            return said
        both = [self.states] if self.exact is None else [self.states, self.exact]
        self.shelf.keep(*both)
        return said

    def _forward(self, module: nn.Module, states: HiddenStates, layer: int) -> None:
        """The states behind a block from those in front of it."""
        for b in self.mine:
            with torch.no_grad():
                x = states.get(layer, b).to(self.device)
                self._replay(b if states is self.states else None)
                states.put(layer + 1, b, self.runner.forward(module, x))
        states.reach(layer + 1)

    def _replay(self, batch: int | None) -> None:
        """Let packed linears take the operands of this batch that were kept."""
        for key, shared in self._shared.items():
            kept = None if batch is None else self._operands.get(key)
            shared.replay = kept[batch] if kept is not None and batch is not None else None

    def _forget_operands(self) -> None:
        self._replay(None)
        self._operands.clear()
        self._shared.clear()

    def _learn(self, block: PackedBlock, layer: int, exact: HiddenStates) -> str:
        """Learn what waits, write it, and let the block compute with it; words on the loss."""
        pairs = Pairs(self.states, exact, layer, self.device)
        groups, (before, after) = learn_block(self.job, block, self._waiting, pairs, self.learning)
        self._waiting.clear()
        encoded = [self._encoded(group) for group in groups]
        self.shelf.write({name: t for tensors in encoded for name, t in tensors.items()})
        for group, tensors in zip(groups, encoded, strict=True):
            if not is_expert(group.linears[0]):
                self._install(block, group.site, group.format, group.linears, tensors)
        return f", error {before:.3g} -> {after:.3g}"

    def _packed(
        self,
        groups: Sequence[Group],
        left: Sequence[int],
        moments: Mapping[str, Tensor],
        crossed: Mapping[str, Tensor],
    ) -> Iterator[tuple[Group, dict[str, Tensor]]]:
        """Each group with its tensors, in every process: what was done, then what is `left`.

        That is rounded in turns of one group a process, and written.
        """
        for i in sorted({*range(len(groups))} - {*left}):
            yield groups[i], self.shelf.read(*groups[i][1:])
        for at in range(0, len(left), self.ranks.size):
            turn = left[at : at + self.ranks.size]
            made = None
            if self.ranks.rank < len(turn):
                site, fmt, group = groups[turn[self.ranks.rank]]
                cross = crossed.get(site.key)
                rounded = self._round_group(site, fmt, group, moments[site.key], cross)
                made = self._encoded(rounded)
                if self.learned:
                    self._waiting.append(rounded)
            for owner, i in enumerate(turn):
                tensors = self.shelf.handed(made if owner == self.ranks.rank else None, owner)
                if not self.learned:
                    self.shelf.write(tensors)
                yield groups[i], tensors

    def _second_moments(
        self,
        block: PackedBlock,
        exact: nn.Module | None,
        layer: int,
        sites: Sequence[tuple[Site, SiteFormat]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean outer products [in + k]^2 of each site's quantized inputs, branch columns last.

        Every token counts about alike (`token_scales`).

        With an `exact` block also those of its inputs with the quantized ones; not of experts, to
        which the two models may send different tokens.
        """
        formats = {site.key: fmt for site, fmt in sites}
        dense = [pair for pair in sites if pair[0].expert is None]
        channels = {
            key: self.job.channels[key].to(self.device)
            for key in formats
            if key in self.job.channels
        }
        moments = {
            site.key: SecondMoment(
                site.width + (fmt.appended or len(channels.get(site.key, ()))), self.device
            )
            for site, fmt in sites
        }
        crossed = {
            site.key: SecondMoment(len(moments[site.key].total), self.device)
            for site, _ in dense
            if exact
        }
        counts = dict.fromkeys(moments, 0)
        latest: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}

        def watch(site: Site, x: Tensor) -> None:
            if site.key in formats:
                fmt, taken = formats[site.key], channels.get(site.key)
                operand = self._operand(site, fmt, x, taken)
                if self._keeping and site.expert is None:
                    self._operands.setdefault(site.key, {})[b] = operand
                met = branch_last(operand, fmt, taken)
                weights[site.key] = token_scales(met)
                latest[site.key] = met * weights[site.key]
                moments[site.key].add(latest[site.key])
                counts[site.key] += len(x)
            if dense and site.key == dense[-1][0].key:
                raise Reached

        for b in self.mine if sites else ():
            self._replay(b)
            with suppress(Reached):
                states = self.states.get(layer, b).to(self.device)
                self.runner.capture(block.module, layer, states, watch)
            if exact is None or self.exact is None:
                continue
            for site, fmt in dense:
                x = self._site_input(exact, site, self.exact.get(layer, b))
                branch = "bf16" if fmt.branch == "fp8" else fmt.branch
                fmt = replace(fmt, activations="none", branch=branch)
                whole = self._operand(site, fmt, x, channels.get(site.key))
                whole = branch_last(whole, fmt, channels.get(site.key))
                crossed[site.key].add(latest[site.key], whole * weights[site.key])
        self._replay(None)
        parts = self.ranks.all_gather(counts) if sites else []
        means: dict[str, Tensor] = {}
        crosses: dict[str, Tensor] = {}
        for key in counts:
            count = sum(part[key] for part in parts)
            moment, cross = moments.pop(key), crossed.pop(key, None)
            if count >= FEWEST:
                means[key] = moment.mean(count, self.ranks)
            else:  # an expert that saw too few tokens: all its columns count alike
                means[key] = torch.eye(len(moment.total), device=self.device)
            if cross is not None:
                crosses[key] = cross.mean(count, self.ranks) if count >= FEWEST else means[key]
        return means, crosses

    def _site_input(self, module: nn.Module, site: Site, states: Tensor) -> Tensor:
        """The input of a site when a block meets hidden states: [tokens, width]."""
        seen: list[Tensor] = []

        def watch(met: Site, x: Tensor) -> None:
            if met.key == site.key:
                seen.append(x)
                raise Reached

        with suppress(Reached):
            self.runner.capture(module, site.layer, states.to(self.device), watch)
        return seen[0]

    def _operand(self, site: Site, fmt: SiteFormat, x: Tensor, channels: Tensor | None) -> Tensor:
        """What the packed linears multiply, [tokens, in] (or [tokens, in + k], see reference)."""
        divisor = self.job.divisors.get(site.key)
        divisor = divisor if divisor is None else divisor.to(self.device)
        return reference.input_operand(x, fmt, self.job.scheme.scale_rule, channels, divisor)

    def _round_group(
        self,
        site: Site,
        fmt: SiteFormat,
        group: Sequence[Linear],
        moments: Tensor,
        cross: Tensor | None,
    ) -> RoundedGroup:
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
            cross,
        )
        return RoundedGroup(site, fmt, group, rounded.split([len(rest) for rest in rests]))

    def _encoded(self, group: RoundedGroup) -> dict[str, Tensor]:
        """The group's bytes by their names in the checkpoint."""
        parts = []
        for one in group.rounded:
            branch = {}
            if one.branch is not None:
                channels = self.job.channels[group.site.key]
                branch = branch_tensors(one.branch.cpu(), channels, group.format)
            parts.append(one.encode() | branch)
        return tensors_of_group(self.job, group.site, group.format, group.linears, parts)

    def _install(
        self,
        block: PackedBlock,
        site: Site,
        fmt: SiteFormat,
        group: Sequence[Linear],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Let the block compute with the bytes that were (or will be) written."""
        shared = SharedInput(fmt, self.job.scheme.scale_rule)
        if not is_expert(group[0]):
            self._shared[site.key] = shared
        for linear in group:
            mine = {n.rpartition(".")[2]: tensors[n].to(self.device) for n in names_of(fmt, linear)}
            block.install(linear, mine, shared)


def stages(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites that can be packed at the same time, in order: one each, all experts' together."""
    experts = [site for site in sites if site.expert is not None]
    for site in sites:
        if site.expert is None:
            yield [site]
    if experts:
        yield experts


def branch_last(operand: Tensor, fmt: SiteFormat, channels: Tensor | None) -> Tensor:
    """The operand as [tokens, in + k]: the branch's columns at the end, zeros in their places.

    A residual branch's columns are at the end, and nothing takes their places.
    """
    if channels is None or fmt.hadamard_size or fmt.branch == "residual":
        return operand
    return torch.cat([operand.index_fill(1, channels, 0), operand[:, channels]], 1)
