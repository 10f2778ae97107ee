"""What this machine can compile and run: compiler, GPU, cache, and the kernel for each format."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from quantkit import console
from quantkit.errors import QuantkitError
from quantkit.kernels import jit
from quantkit.kernels.capability import GPUS, KERNELS, PAIRS, Kernel, find

BRANCHES = (None, "bf16", "fp8")


def examine() -> dict[str, Any]:
    """Return everything `quantkit doctor` prints; compiles nothing and changes nothing."""
    compiler = _compiler()
    devices = _devices()
    return {
        "compiler": compiler,
        "packages": {name: _version(name) for name in ("torch", "transformers", "nvidia-cutlass")},
        "devices": devices,
        "cache": _cache(jit.cache_dir()),
        "forced": os.environ.get("QUANTKIT_KERNEL"),
        "formats": [
            {
                "weights": weights,
                "activations": activations,
                "here": _here(weights, activations, devices, compiler),
                "elsewhere": {
                    gpu: _on(weights, activations, capability) for capability, gpu in GPUS.items()
                },
            }
            for weights, activations in PAIRS
        ],
    }


def as_text(found: dict[str, Any]) -> str:
    """Lay the result of `examine` out for reading."""
    compiler, cache = found["compiler"], found["cache"]
    lines = []
    if compiler["ready"]:
        lines += [
            f"compiler       nvcc {compiler['version']} ({compiler['nvcc']})",
            f"host compiler  {compiler['host'] or 'none: install g++'}",
            f"CUTLASS        {compiler['cutlass']}",
        ]
    else:
        lines += [f"compiler       {compiler['problem']}", f"               {compiler['hint']}"]
    lines += [f"{name:14} {version or '-'}" for name, version in found["packages"].items()]
    for device in found["devices"]:
        lines.append(
            f"GPU {device['index']}          {device['name']}, compute capability "
            f"{device['capability'][0]}.{device['capability'][1]}"
        )
    if not found["devices"]:
        lines.append("GPU            none that torch can use")
    lines.append(
        f"cache          {cache['path']}: {cache['kernels']} kernels, {cache['bytes'] / 1e6:.1f} MB"
        + "".join(f", {cache[kind]} {kind}" for kind in ("failed", "corrupt") if cache[kind])
    )
    if found["forced"]:
        lines.append(f"forced         QUANTKIT_KERNEL={found['forced']}")
    here = [
        (f"{row['weights']} x {row['activations']}", row["here"]["kernel"], row["here"]["why"])
        for row in found["formats"]
    ]
    there = [
        (f"{row['weights']} x {row['activations']}", *row["elsewhere"].values())
        for row in found["formats"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            console.table(("packed linears", "run here on", "because"), here),
            "",
            console.table(("on other GPUs", *GPUS.values()), there),
            *_never_ran(),
        ]
    )


def _compiler() -> dict[str, Any]:
    try:
        tools = jit.toolchain()
    except QuantkitError as error:
        return {"ready": False, "problem": error.message, "hint": error.hint}
    return {
        "ready": True,
        "nvcc": str(tools.nvcc),
        "version": tools.nvcc_version,
        "host": shutil.which("g++"),
        "cutlass": tools.cutlass_version,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [
        {
            "index": index,
            "name": torch.cuda.get_device_name(index),
            "capability": torch.cuda.get_device_capability(index),
        }
        for index in range(torch.cuda.device_count())
    ]


def _cache(path: Path) -> dict[str, Any]:
    entries = [entry for entry in path.glob("[!.]*") if entry.is_dir()]  # no build under way
    kinds = {"failed": 0, "corrupt": 0, "kernels": 0}
    size = 0
    for entry in entries:
        kind = entry.suffix.removeprefix(".")
        kinds[kind if kind in ("failed", "corrupt") else "kernels"] += 1
        size += sum(file.stat().st_size for file in entry.glob("*") if file.is_file())
    return {"path": str(path), "bytes": size, **kinds}


def _here(
    weights: str, activations: str, devices: list[dict[str, Any]], compiler: dict[str, Any]
) -> dict[str, str]:
    """The kernel for the first GPU, and why: what `dispatch` will decide, shapes apart."""
    if os.environ.get("QUANTKIT_KERNEL") == "reference":
        return {"kernel": "reference", "why": "QUANTKIT_KERNEL=reference"}
    capability = tuple(devices[0]["capability"]) if devices else None
    found = find(weights, activations, None, capability)
    if isinstance(found, str):
        return {"kernel": "reference", "why": found}
    if not compiler["ready"]:
        return {"kernel": "reference", "why": compiler["problem"]}
    if tuple(map(int, compiler["version"].split(".")[:2])) < found.nvcc:
        oldest = ".".join(map(str, found.nvcc))
        return {"kernel": "reference", "why": f"{found.arch} needs nvcc {oldest} or newer"}
    return {"kernel": found.name, "why": _with_branches(weights, activations, found)}


def _on(weights: str, activations: str, capability: tuple[int, int]) -> str:
    found = find(weights, activations, None, capability)
    return "reference" if isinstance(found, str) else found.name


def _with_branches(weights: str, activations: str, kernel: Kernel) -> str:
    branches = [
        branch
        for branch in BRANCHES
        if branch and not isinstance(find(weights, activations, branch, kernel.capability), str)
    ]
    return f"branches: {', '.join(branches)}" if branches else "no branch"


def _never_ran() -> list[str]:
    unseen = sorted({row.arch for row in KERNELS if not row.ran})
    lines = [""]
    if unseen:
        lines.append(
            f"Compiled and inspected, but never run on their hardware: {', '.join(unseen)}."
        )
    return lines
