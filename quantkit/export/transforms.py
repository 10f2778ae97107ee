"""Online Hadamards as compressed-tensors' `transform_config`: `hadamard` at the input of linears.

Its deterministic Hadamard is Sylvester's, which ours is too at powers of two. The weights in the
file are rotated already, so only the input side is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantkit.errors import InputRejected
from quantkit.model.sites import ModelLayout
from quantkit.pack.scheme import Scheme


def write_config(scheme: Scheme, layout: ModelLayout) -> dict[str, Any]:
    """The `transform_config` object: one group for each size of block; empty without Hadamards."""
    modules: dict[int, list[str]] = {}
    for site in layout.sites:
        fmt = scheme.site(site.key, site.kind)
        if fmt is not None and fmt.hadamard_size:
            names = [linear.module for linear in site.linears]
            modules.setdefault(fmt.hadamard_size, []).extend(names)
    groups = {
        f"hadamard_{size}": {
            "type": "hadamard",
            "apply": [{"targets": names, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
        for size, names in modules.items()
    }
    return {"config_groups": groups} if groups else {}


def read_config(
    data: Any, layout: ModelLayout, is_target: Callable[[str, str], bool]
) -> dict[str, Mapping[str, int]]:
    """Hadamards by site key; InputRejected for every other transform, which would be left out."""
    if not data:
        return {}
    groups = data.get("config_groups") if isinstance(data, dict) else None
    if not isinstance(groups, dict):
        raise InputRejected("transform_config is not understood")
    found: dict[str, Mapping[str, int]] = {}
    for group in groups.values():
        size, targets = _read_group(group)
        for site in layout.sites:
            hits = {any(is_target(x.module, t) for t in targets) for x in site.linears}
            if len(hits) != 1 or (True in hits and (site.key in found or site.width % size)):
                raise InputRejected(f"transform_config: what happens to {site.key} is not clear")
            if True in hits:
                found[site.key] = {"block": size}
    return found


def _read_group(group: Any) -> tuple[int, list[str]]:
    """Size and targets of a group of online Hadamards at inputs."""
    applied = group.get("apply") if isinstance(group, dict) else None
    size = group.get("head_dim") if isinstance(group, dict) else None
    if (
        not isinstance(applied, list)
        or group.get("type") != "hadamard"
        or group.get("randomize")
        or not isinstance(size, int)
        or size < 2
        or size & (size - 1)
    ):
        raise InputRejected(
            "transform_config: a transform that quantkit does not run",
            "it runs deterministic Hadamards of a power of two (head_dim) at inputs",
        )
    targets: list[str] = []
    for arguments in applied:
        location = arguments.get("location") if isinstance(arguments, dict) else None
        if location == "weight_input":
            continue  # done to the weights before they were packed
        names = arguments.get("targets") if isinstance(arguments, dict) else None
        if location != "input" or not isinstance(names, list) or arguments.get("ignore"):
            raise InputRejected(f"transform_config: location {str(location)[:40]!r} is not run")
        targets += map(str, names)
    return size, targets
