"""What an export will do, before anything is written: every site's format afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputRejected, UsageError
from quantkit.export import compressed_tensors, modelopt
from quantkit.export.fold import plain_format
from quantkit.model.families import describe
from quantkit.model.sites import Linear, ModelLayout, Site
from quantkit.pack.layout import tensors_of
from quantkit.pack.scheme import Scheme, SiteFormat, from_sites

TARGETS = (compressed_tensors.METHOD, modelopt.METHOD)


@dataclass(frozen=True)
class Job:
    """A packed checkpoint as it is, and as it will be."""

    source: Checkpoint
    layout: ModelLayout
    to: str
    before: Scheme
    scheme: Scheme  # after
    folded: tuple[Site, ...]  # sites whose weights are rounded again
    notes: tuple[str, ...]

    @property
    def linears(self) -> int:
        """How many packed linears there are."""
        packed = (s for s in self.layout.sites if self.scheme.site(s.key, s.kind) is not None)
        return sum(len(site.linears) for site in packed)

    @property
    def section(self) -> dict[str, Any]:
        """compressed-tensors' `quantization_config`."""
        return compressed_tensors.write_config(self.scheme, self.layout)

    def scheme_of(self, site: Site) -> SiteFormat:
        """The format of a packed site afterwards."""
        fmt = self.scheme.site(site.key, site.kind)
        assert fmt is not None
        return fmt


def prepare(source: Checkpoint, to: str, fold_outliers: bool) -> Job:
    """Decide every site's format. Raises InputRejected and UsageError as `export` does."""
    from quantkit.runtime.load import scheme_of

    if to not in TARGETS:
        raise UsageError(f"--to {to}: one of {', '.join(TARGETS)}")
    before = scheme_of(source)
    if before is None:
        raise InputRejected(f"{source.path}: is not packed", f"quantkit pack {source.path}")
    layout = describe(source.config, source.tensors)
    formats: dict[str, SiteFormat | None] = {}
    folded = []
    for site in layout.sites:
        fmt = before.site(site.key, site.kind)
        formats[site.key] = fmt and _after(site, fmt, to, fold_outliers)
        if formats[site.key] != fmt:
            folded.append(site)
        if fmt is not None:
            _check(source, site.linears, fmt, to)
    for linear, fmt in before.ends(layout):
        _check_end(layout, linear, fmt, to)
        _check(source, (linear,), fmt, to)
    scheme = from_sites(before.name, layout, formats, before.scale_rule)
    scheme = scheme.with_ends(before.head, before.embedding)
    notes = []
    if any(fmt is not None and fmt.hadamard for fmt in formats.values()):
        notes.append(
            "transform_config rotates inputs online: vLLM reads it, transformers (5.23) does not "
            "and would give wrong outputs"
        )
    if to == compressed_tensors.METHOD and any(site.expert is not None for site in layout.sites):
        notes.append(
            "experts: transformers (5.23) unpacks their weights and leaves their inputs unrounded; "
            "5.0 does not load them"
        )
    return Job(source, layout, to, before, scheme, tuple(folded), tuple(notes))


def _after(site: Site, fmt: SiteFormat, to: str, fold: bool) -> SiteFormat:
    """The format of a site in the export; UsageError when the target has no word for it."""
    if fmt.branch == "residual":
        raise UsageError(
            f"{site.key} has a residual branch, which {to} cannot express",
            "pack the unpacked checkpoint again, with no branch",
        )
    if to == modelopt.METHOD:
        if modelopt.can_describe(fmt):
            return fmt
        if fmt.weights == fmt.activations == "nvfp4":
            raise UsageError(
                f"{site.key} is {fmt.words()}: modelopt has plain NVFP4 only",
                "fold it first: quantkit export --to compressed-tensors --fold-outliers",
            )
        raise UsageError(
            f"{site.key} is {fmt.words()}: modelopt is written for NVFP4 only",
            "pack the unpacked checkpoint again: quantkit pack --scheme nvfp4",
        )
    if compressed_tensors.has_words_for(fmt):
        return fmt
    if fmt.weights == "none":
        raise UsageError(f"{site.key} is not rounded (packed with --dtype)", "pack it without")
    if not fold:
        what = "a branch" if fmt.branch else f"a Hadamard of {fmt.hadamard_size}"
        raise UsageError(
            f"{site.key} has {what}, which compressed-tensors has no word for",
            "--fold-outliers folds it into the weights and rounds them again (lossy, measured)",
        )
    kept = plain_format(fmt, keep_hadamard=True)
    keep = compressed_tensors.has_words_for(kept)
    return kept if keep else plain_format(fmt, keep_hadamard=False)


def _check_end(layout: ModelLayout, linear: Linear, fmt: SiteFormat, to: str) -> None:
    """UsageError when the target has no word for a packed matrix outside the blocks."""
    if to == modelopt.METHOD:
        raise UsageError(
            f"{linear.module} is packed as {fmt.weights}: modelopt is written for NVFP4 linears of "
            "the blocks only",
            "pack the unpacked checkpoint again without --head and --embedding",
        )
    if linear == layout.table and fmt.weights != "mxfp8":
        raise UsageError(
            f"{linear.module} is packed as {fmt.weights}, which transformers cannot load as {to}",
            "pack the unpacked checkpoint again with --embedding mxfp8, or without",
        )
    if layout.tied:
        raise UsageError(
            "one packed matrix is the embedding and the head, which compressed-tensors cannot say",
            "pack the unpacked checkpoint again without --head and --embedding",
        )


def _check(source: Checkpoint, linears: tuple[Linear, ...], fmt: SiteFormat, to: str) -> None:
    """InputRejected when a linear's tensors are not those of its format."""
    for linear in linears:
        for name, (dtype, shape) in tensors_of(fmt, *linear.shape).items():
            info = source.info(f"{linear.module}.{name}")
            if info.dtype != dtype or tuple(info.shape) != shape:
                raise InputRejected(
                    f"{info.name} is {info.dtype} {tuple(info.shape)}, not {dtype} {shape}"
                )
            if to == modelopt.METHOD and name.endswith("global_scale"):
                value = source.read(info.name)
                if not modelopt.is_exact(value):
                    raise InputRejected(
                        f"{info.name} is {float(value):g}: its reciprocal, which modelopt stores, "
                        "would be rounded",
                        "pack the checkpoint with quantkit, whose global scales are powers of two",
                    )
