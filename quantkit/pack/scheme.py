"""Schemes: which format each site gets, as data, and as it stands in `config.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from quantkit.errors import InputRejected, UsageError
from quantkit.formats import FORMATS
from quantkit.model.sites import KINDS, Linear, ModelLayout
from quantkit.pack.recipes import RECIPES

METHOD = "quantkit"
FORMAT_VERSION = 1
WITH_ENDS = 2  # the version of a checkpoint whose embedding or head is packed, and of no other
WEIGHTS = ("mxfp4", "nvfp4", "mxfp8", "none")  # none: numbers stored as they are
ACTIVATIONS = ("mxfp4", "nvfp4", "mxfp8", "none")
BRANCHES = ("bf16", "fp8", "residual")
RESIDUAL_FORMATS = ("mxfp4", "nvfp4", "none")  # of weights and of activations alike
ENDS = ("mxfp8", "mxfp4")  # what `pack` makes of the embedding and the output head
RULES = ("floor", "even", "even4", "ceil", "rceil", "mse")
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class SiteFormat:
    """What the linears of a site hold and what happens to their input.

    At run time: gather the outlier channels for the branch and zero them, apply the online
    Hadamard to the rest, quantize it, multiply, add the branch.

    The branch `residual` takes no channel out: what quantization lost of the channels is quantized
    again and appended to the input, in the format of the main path, and the weight has as many
    columns more, all in one GEMM (ARCQuant, 2601.07475). Its channels are those of the operand as
    it is quantized: of the rotated input where there is an online Hadamard.
    """

    weights: str
    activations: str
    branch: str | None = None  # precision of the separated channels, or residual
    group: int = 32  # the plan took at most one channel of each such group (0: it took any)
    outliers: int = 0  # columns of the branch, padding included
    hadamard: Mapping[str, int] | None = None  # {"block": n} or {"size": n}: online, on the rest

    def to_json(self) -> dict[str, Any]:
        """The SITE object of `quantization_config`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def hadamard_size(self) -> int:
        """Channels that the online Hadamard mixes at a time; 0 without one."""
        return next(iter(self.hadamard.values())) if self.hadamard else 0

    def words(self) -> str:
        """The format as a table shows it."""
        text = (
            self.weights
            if self.weights == self.activations
            else (f"{self.weights} x {self.activations}")
        )
        if self.branch is not None:
            text += f" + {self.branch} branch"
        return text + (f", Hadamard {self.hadamard_size}" if self.hadamard else "")

    @property
    def appended(self) -> int:
        """Columns of a residual branch: the main path's weight and input are that much wider."""
        return self.outliers if self.branch == "residual" else 0

    @property
    def plain(self) -> bool:
        """Whether nothing happens at run time besides quantizing the input."""
        return self.branch is None and self.hadamard is None


@dataclass(frozen=True)
class Scheme:
    """Formats by site kind, exceptions by site key, and the rule of the block scales.

    `head` and `embedding` are the matrices outside the blocks, None as they are. The head is a
    linear like any other; of the embedding, rows are decoded as they are looked up.
    """

    name: str
    sites: Mapping[str, SiteFormat | None]  # None: ordinary linears
    scale_rule: str = "even"
    overrides: Mapping[str, SiteFormat | None] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    head: SiteFormat | None = None
    embedding: SiteFormat | None = None

    def site(self, key: str, kind: str) -> SiteFormat | None:
        """The format of one site; None when it stays as it is."""
        return self.overrides[key] if key in self.overrides else self.sites[kind]

    def ends(self, layout: ModelLayout) -> list[tuple[Linear, SiteFormat]]:
        """The packed matrices outside the blocks; a tied head is stored as the embedding alone."""
        found = ((layout.table, self.embedding), (layout.head, self.head))
        return [(linear, fmt) for linear, fmt in found if linear is not None and fmt is not None]

    def with_ends(self, head: SiteFormat | None, embedding: SiteFormat | None) -> Scheme:
        """The scheme with these formats of head and embedding."""
        ignore = ("lm_head",) if head is None else ()
        return replace(self, head=head, embedding=embedding, ignore=ignore)

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` object."""
        ends = {
            name: fmt.to_json()
            for name, fmt in (("head", self.head), ("embedding", self.embedding))
            if fmt is not None
        }
        return {
            "quant_method": METHOD,
            "format_version": WITH_ENDS if ends else FORMAT_VERSION,
            "scheme": self.name,
            "scale_rule": self.scale_rule,
            "sites": {kind: site and site.to_json() for kind, site in self.sites.items()},
            "overrides": {key: site and site.to_json() for key, site in self.overrides.items()},
            "ignore": list(self.ignore),
            **ends,
        }


def build(
    name: str,
    *,
    group: int = 32,
    scale_rule: str = "even",
    branch: str = "bf16",
    mlp_out: str | None = None,
    sites: Mapping[str, str] | None = None,
    separated: bool = False,
) -> Scheme:
    """The scheme `name` with its options.

    `osc` separates outliers at attn_in, attn_out and mlp_in and gives mlp_out MXFP8 (the paper's
    recipe); `mlp_out="mxfp4"` keeps mlp_out at 4 bits with a branch of its own. `sites` maps kinds
    to FORMAT or FORMAT+BRANCH, `bf16` leaving a kind out. `separated` gives every site of the
    plain formats (and of recipes) a branch. Raises UsageError.
    """
    if group not in GROUPS:
        raise UsageError(f"group {group}: one of {', '.join(map(str, GROUPS))}")
    if scale_rule not in RULES:
        raise UsageError(f"scale rule {scale_rule!r}: one of {', '.join(RULES)}")
    if branch not in BRANCHES:
        raise UsageError(f"branch {branch!r}: one of {', '.join(BRANCHES)}")
    base = RECIPES[name].format if name in RECIPES else name
    if base in ("mxfp4", "nvfp4", "mxfp8"):
        plain = SiteFormat(base, base, branch if separated else None, group)
        formats: dict[str, SiteFormat | None] = dict.fromkeys(KINDS, plain)
    elif name == "osc":
        formats = dict.fromkeys(KINDS, SiteFormat("mxfp4", "mxfp4", branch, group))
        formats["mlp_out"] = SiteFormat("mxfp8", "mxfp8")
    else:
        raise UsageError(f"unknown scheme {name!r}", f"schemes: {', '.join(SCHEMES)}")
    if mlp_out is not None:
        keeps_branch = name == "osc" and mlp_out in ("mxfp4", "nvfp4")
        sites = {"mlp_out": f"{mlp_out}+{branch}" if keeps_branch else mlp_out, **(sites or {})}
    for kind, text in (sites or {}).items():
        if kind not in KINDS:
            raise UsageError(f"unknown site kind {kind!r}", f"kinds: {', '.join(KINDS)}")
        formats[kind] = None if text == "bf16" else _site_format(text, group)
    for kind, fmt in formats.items():
        if fmt is not None and not _residual_fits(fmt):
            raise UsageError(
                f"{kind}: a residual branch extends 4-bit formats, not {fmt.weights}",
                f"leave it out for this kind: --site {kind}={fmt.weights}",
            )
    return Scheme(name, formats, scale_rule)


def end_format(name: str, option: str) -> SiteFormat:
    """The format of `--head` or `--embedding`; UsageError when there is no such one."""
    if name not in ENDS:
        raise UsageError(f"{option} {name}: one of {', '.join(ENDS)}")
    return SiteFormat(name, name if option == "--head" else "none")


def from_sites(
    name: str, layout: ModelLayout, formats: Mapping[str, SiteFormat | None], rule: str
) -> Scheme:
    """State each kind's commonest format once and the sites that differ as overrides."""
    sites: dict[str, SiteFormat | None] = {}
    overrides: dict[str, SiteFormat | None] = {}
    for kind in KINDS:
        mine = [site for site in layout.sites if site.kind == kind]
        sites[kind] = _commonest([formats[site.key] for site in mine])
        overrides |= {s.key: formats[s.key] for s in mine if formats[s.key] != sites[kind]}
    return Scheme(name, sites, rule, overrides)


def _commonest(formats: list[SiteFormat | None]) -> SiteFormat | None:
    text = Counter(map(str, formats)).most_common(1)
    return next((fmt for fmt in formats if text and str(fmt) == text[0][0]), None)


SCHEMES = ("mxfp4", "nvfp4", "mxfp8", "osc", *RECIPES)


def _site_format(text: str, group: int) -> SiteFormat:
    name, _, branch = text.partition("+")
    if name not in WEIGHTS or name == "none" or (branch and branch not in BRANCHES):
        raise UsageError(
            f"unknown format {text!r}",
            f"formats: bf16, {', '.join(WEIGHTS[:-1])}, each with +{' or +'.join(BRANCHES)}",
        )
    return SiteFormat(name, name, branch or None, group)


def _residual_fits(fmt: SiteFormat) -> bool:
    """Whether a residual branch, if there is one, shares one 4-bit format with the main path."""
    if fmt.branch != "residual":
        return True
    if fmt.weights not in RESIDUAL_FORMATS or fmt.activations != fmt.weights:
        return False
    return fmt.outliers % (FORMATS[fmt.weights].block or 1) == 0


def unrounded(fmt: SiteFormat) -> SiteFormat:
    """The same separation and online transform with no rounding."""
    branch = fmt.branch
    if branch == "fp8":
        branch = "bf16"  # holds the weights' own numbers where they are kept
    return replace(fmt, weights="none", activations="none", branch=branch)


def pass_through(scheme: Scheme) -> Scheme:
    """The scheme with nothing rounded: what a transform is tested by."""
    return replace(scheme, sites={k: fmt and unrounded(fmt) for k, fmt in scheme.sites.items()})


def from_json(data: Mapping[str, Any]) -> Scheme:
    """Read a `quantization_config` object; InputRejected when it is not one of this version."""
    if data.get("quant_method") != METHOD:
        raise InputRejected(f"quant_method {data.get('quant_method')!r} is not {METHOD!r}")
    version = WITH_ENDS if "head" in data or "embedding" in data else FORMAT_VERSION
    if data.get("format_version") != version:
        raise InputRejected(
            f"packed format version {data.get('format_version')!r} is not {version}",
            "it was packed by another version of quantkit",
        )
    sites, overrides = data.get("sites"), data.get("overrides", {})
    ignore, rule = data.get("ignore", []), data.get("scale_rule")
    if (
        not isinstance(sites, dict)
        or set(sites) != set(KINDS)
        or not isinstance(overrides, dict)
        or not isinstance(ignore, list)
        or rule not in RULES
    ):
        raise InputRejected("quantization_config: not understood")
    return Scheme(
        str(data.get("scheme")),
        {kind: sites[kind] and read_site(sites[kind], kind) for kind in KINDS},
        rule,
        {key: site and read_site(site, key) for key, site in overrides.items()},
        tuple(map(str, ignore)),
        _read_end(data.get("head"), "head"),
        _read_end(data.get("embedding"), "embedding"),
    )


def _read_end(data: object, where: str) -> SiteFormat | None:
    if data is None:
        return None
    fmt = read_site(data, where)
    check_end(fmt, where)
    return fmt


def check_end(fmt: SiteFormat, where: str) -> None:
    """InputRejected for a format that head or embedding (`where`) cannot have."""
    looked_up = where == "embedding" and fmt.activations != "none"
    if not fmt.plain or fmt.weights == "none" or looked_up:
        raise InputRejected(f"quantization_config: {where} is not understood")


def read_site(data: object, where: str) -> SiteFormat:
    """Read a SITE object of `quantization_config`; InputRejected names `where` it stands."""
    if not isinstance(data, dict) or not set(data) <= {f.name for f in fields(SiteFormat)}:
        raise InputRejected(f"quantization_config: site {where} is not understood")
    site = SiteFormat(**{"weights": "", "activations": "", **data})
    hadamard = site.hadamard
    if (
        site.weights not in WEIGHTS
        or site.activations not in ACTIVATIONS
        or site.branch not in (None, *BRANCHES)
        or not isinstance(site.group, int)
        or not isinstance(site.outliers, int)
        or site.outliers < 0
        or not (
            hadamard is None
            or (
                isinstance(hadamard, dict)
                and set(hadamard) in ({"block"}, {"size"})
                and all(isinstance(n, int) and n > 0 for n in hadamard.values())
            )
        )
        or not _residual_fits(site)
    ):
        raise InputRejected(f"quantization_config: site {where} is not understood")
    return site
