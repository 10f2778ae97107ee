"""compressed-tensors' description of a packed checkpoint: what vLLM and transformers read.

It can say formats per linear, and online Hadamards of a power of two (`transforms.py`); it has no
word for a 16-bit branch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.errors import InputRejected
from quantkit.export import transforms
from quantkit.model.sites import ModelLayout
from quantkit.pack.scheme import RULES, Scheme, SiteFormat, check_end, from_sites

METHOD = "compressed-tensors"
FORMATS = {
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
_ARGUMENTS = {
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
}
_RULE = "scale_rule"  # among observer_kwargs, which readers of the files do not use


def can_describe(scheme: Scheme, tied: bool = False) -> bool:
    """Whether every packed site, embedding and head is one that compressed-tensors has words for.

    It has none for a packed matrix that is both of them (`tied`), and what it says of an embedding
    in 4 bits transformers (5.23) cannot load.
    """
    used = [fmt for fmt in (*scheme.sites.values(), *scheme.overrides.values()) if fmt]
    ends = [fmt for fmt in (scheme.head, scheme.embedding) if fmt]
    four_bits = scheme.embedding is not None and scheme.embedding.weights != "mxfp8"
    if not used or four_bits or (ends and tied):
        return False
    return all(fmt.plain and has_words_for(fmt) for fmt in (*used, *ends))


def has_words_for(fmt: SiteFormat) -> bool:
    """Whether a site without a branch can be written: formats, and the Hadamard if it has one."""
    size = fmt.hadamard_size
    return (
        fmt.branch is None
        and fmt.weights in FORMATS
        and fmt.activations in (*FORMATS, "none")
        and size & (size - 1) == 0
    )


def write_config(scheme: Scheme, layout: ModelLayout) -> dict[str, Any]:
    """The `quantization_config` object of a packed checkpoint.

    One group per pair of formats. A group that covers whole kinds of sites names the leaves of
    their modules; otherwise it names modules one by one.
    """
    modules: dict[tuple[str, str], list[str]] = {}
    ignored = list(scheme.ignore)
    for site in layout.sites:
        fmt = scheme.site(site.key, site.kind)
        names = [linear.module for linear in site.linears]
        ignored += [linear.module for linear in site.unquantized]
        if fmt is None:
            ignored += names
        else:
            modules.setdefault((fmt.weights, fmt.activations), []).extend(names)
    for linear, fmt in scheme.ends(layout):
        modules.setdefault((fmt.weights, fmt.activations), []).append(linear.module)
    groups = {}
    for number, ((weights, activations), names) in enumerate(modules.items()):
        others = [
            name for key, rest in modules.items() if key != (weights, activations) for name in rest
        ]
        alone = len(modules) == 1 and scheme.embedding is None
        targets = ["Linear"] if alone else _patterns(names, others)
        groups[f"group_{number}"] = {
            "format": FORMATS[weights],
            "targets": targets,
            "weights": _weights(weights, scheme.scale_rule),
            "input_activations": _activations(activations),
            "output_activations": None,
        }
    formats = {group["format"] for group in groups.values()}
    every = [name for names in modules.values() for name in names]
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*scheme.ignore, *_patterns(ignored[len(scheme.ignore) :], every)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "transform_config": transforms.write_config(scheme, layout),
    }


def _patterns(names: list[str], others: list[str]) -> list[str]:
    """Targets that match `names` and none of `others`: by leaf where leaves tell them apart."""
    taken = {name.rpartition(".")[2] for name in others}
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    exact = [name for name in names if name.rpartition(".")[2] in taken or "." not in name]
    free = [leaf for leaf in leaves if leaf not in (*taken, *exact)]
    return [*(rf"re:.*\.{re.escape(leaf)}$" for leaf in free), *exact]


def _weights(name: str, rule: str) -> dict[str, Any]:
    return _arguments(name) | {
        "dynamic": False,
        "observer": "memoryless_minmax",
        "observer_kwargs": {} if name == "nvfp4" else {_RULE: "even" if rule == "even4" else rule},
    }


def _activations(name: str) -> dict[str, Any] | None:
    if name == "none":
        return None
    dynamic = "local" if name == "nvfp4" else True  # local: the global scale is a stored number
    return _arguments(name) | {
        "dynamic": dynamic,
        "observer": "static_minmax" if name == "nvfp4" else None,
        "observer_kwargs": {},
    }


def _arguments(name: str) -> dict[str, Any]:
    return {
        "type": "float",
        "symmetric": True,
        "zp_dtype": None,
        "actorder": None,
        "block_structure": None,
        **_ARGUMENTS[name],
    }


def check_method(data: Mapping[str, Any]) -> None:
    """InputRejected when the configuration is not compressed-tensors'."""
    if data.get("quant_method") != METHOD:
        raise InputRejected(
            f"quant_method {str(data.get('quant_method'))[:40]!r} is not one quantkit runs",
            f"it runs quantkit and {METHOD}; `quantkit inspect` shows what the checkpoint is",
        )


def read_config(data: Mapping[str, Any], layout: ModelLayout) -> Scheme:
    """The scheme a compressed-tensors configuration describes, for the formats quantkit has.

    InputRejected for anything else.
    """
    check_method(data)
    groups, ignore = data.get("config_groups"), data.get("ignore") or []
    if not isinstance(groups, dict) or not isinstance(ignore, list) or not groups:
        raise InputRejected("quantization_config: config_groups are not understood")
    formats = [(_targets(group), *_read_group(group)) for group in groups.values()]
    hadamards = transforms.read_config(data.get("transform_config"), layout, is_target)
    found: dict[str, SiteFormat | None] = {}
    rules = set()
    for site in layout.sites:
        matches = {_match(linear.module, formats, ignore) for linear in site.linears}
        if len(matches) != 1:
            raise InputRejected(f"quantization_config: {site.key} mixes formats")
        number = matches.pop()
        found[site.key] = None if number is None else formats[number][1]
        if site.key in hadamards:
            if number is None:
                raise InputRejected(f"transform_config: {site.key} is rotated but not packed")
            found[site.key] = replace(formats[number][1], hadamard=hadamards[site.key])
        if number is not None:
            rules.add(formats[number][2])
    head, table = _read_ends(layout, formats, ignore)
    rule = rules.pop() if len(rules) == 1 else "even"
    used = (*found.values(), head)
    if rule == "even" and any(fmt and fmt.activations == "mxfp8" for fmt in used):
        rule = "even4"  # how the library quantizes inputs; without MXFP8 the two are one
    return from_sites(METHOD, layout, found, rule).with_ends(head, table)


def _read_ends(
    layout: ModelLayout, formats: list[tuple[list[str], SiteFormat, str]], ignore: list[Any]
) -> tuple[SiteFormat | None, SiteFormat | None]:
    """The formats of the head (where it is a matrix of its own) and of the embedding."""
    number = None if layout.head is None else _match(layout.head.module, formats, ignore)
    head = None if number is None else formats[number][1]
    name = layout.table.module
    tables = [
        ([name if t == "Embedding" else t for t in targets if t != "Linear"], fmt, rule)
        for targets, fmt, rule in formats
    ]
    number = _match(name, tables, ignore)
    table = None if number is None else formats[number][1]
    for fmt, where in ((head, "head"), (table, "embedding")):
        if fmt is not None:
            check_end(fmt, where)
    return head, table


def _targets(group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InputRejected("quantization_config: targets of a group are not understood")
    return targets


def _read_group(group: Mapping[str, Any]) -> tuple[SiteFormat, str]:
    weights = _read_arguments(group.get("weights"))
    activations = _read_arguments(group.get("input_activations"))
    if weights is None or group.get("output_activations") is not None:
        raise InputRejected("quantization_config: a group's formats are not ones quantkit has")
    kwargs = group["weights"].get("observer_kwargs")
    rule = kwargs.get(_RULE, "even") if isinstance(kwargs, dict) else "even"
    if rule not in RULES:
        raise InputRejected("quantization_config: unknown scale rule")
    return SiteFormat(weights, activations or "none"), rule


def _read_arguments(arguments: Any) -> str | None:
    if arguments is None:
        return None
    for name, expected in _ARGUMENTS.items():
        if (
            isinstance(arguments, dict)
            and arguments.get("type") == "float"
            and all(arguments.get(key) in (value, None) for key, value in expected.items())
            and arguments.get("num_bits") == expected["num_bits"]
            and arguments.get("group_size") == expected["group_size"]
        ):
            return name
    raise InputRejected("quantization_config: a group's formats are not ones quantkit has")


def _match(
    module: str, formats: list[tuple[list[str], SiteFormat, str]], ignore: list[Any]
) -> int | None:
    if any(is_target(module, str(target)) for target in ignore):
        return None
    exact = (n for n, (targets, *_) in enumerate(formats) if module in targets)
    loose = (
        n for n, (targets, *_) in enumerate(formats) if any(is_target(module, t) for t in targets)
    )
    return next(exact, next(loose, None))


def is_target(module: str, target: str) -> bool:
    """Whether a target (`Linear`, a module's name, `re:` and a pattern) means a linear.

    InputRejected for a pattern that is none, or could take for ever.
    """
    if target.startswith("re:"):
        pattern = target[3:]
        # A stranger's pattern may take exponential time to fail: repeated groups, many stars.
        endless = re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+]|\{", pattern)) > 4
        try:
            if endless or len(pattern) > 500:
                raise re.error("too costly")
            return re.match(pattern, module) is not None
        except re.error:
            raise InputRejected(
                f"quantization_config: {target[:60]!r} is no pattern to match"
            ) from None
    return target in ("Linear", module)
