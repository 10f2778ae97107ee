"""Compile kernels before they are needed: all that an architecture can ask for at run time."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from quantkit import console
from quantkit.errors import UsageError
from quantkit.kernels import jit
from quantkit.kernels.capability import KERNELS
from quantkit.kernels.generate import Source, sources


def architectures() -> list[str]:
    """Return the nvcc targets that have kernels."""
    return sorted({row.arch for row in KERNELS})


def build(
    archs: list[str], formats: list[str] | None = None, jobs: int | None = None
) -> dict[str, Any]:
    """Compile every kernel of `archs` that is not cached yet, `jobs` at a time.

    No arch means that of the first GPU. `formats` keeps pairs such as `mxfp4` or `mxfp4,mxfp8`
    (weights, activations). Raises UsageError for an unknown name, CompileError for the first
    kernel that fails.
    """
    archs = archs or [_arch_here()]
    for arch in archs:
        if arch not in architectures():
            raise UsageError(f"no kernels for {arch!r}", f"known: {', '.join(architectures())}")
    pairs = None if formats is None else [_pair(text) for text in formats]
    todo = [source for arch in archs for source in sources(arch, pairs)]
    missing = [source for source in todo if not jit.is_valid(_entry(source))]
    start = time.monotonic()
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        futures = [pool.submit(jit.compile, s.text, s.name, s.arch) for s in missing]
        with console.progress("kernels", len(missing)) as bar:
            try:
                for future, source in zip(futures, missing, strict=True):
                    future.result()
                    bar.advance(detail=f"{source.name} {source.arch}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return {
        "architectures": archs,
        "kernels": len(todo),
        "compiled": len(missing),
        "seconds": round(time.monotonic() - start, 1),
        "cache": str(jit.cache_dir()),
    }


def _pair(text: str) -> tuple[str, str]:
    weights, _, activations = text.partition(",")
    pair = (weights, activations or weights)
    known = {(row.weights, row.activations) for row in KERNELS}
    if pair not in known:
        names = ", ".join(sorted(f"{w},{a}" if w != a else w for w, a in known))
        raise UsageError(f"no kernel for format {text!r}", f"formats: {names}")
    return pair


def _entry(source: Source) -> Any:
    return jit.entry_for(source.text, source.name, source.arch)


def _arch_here() -> str:
    import torch

    if torch.version.cuda is not None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        for row in KERNELS:
            if row.capability == capability:
                return row.arch
        raise UsageError(
            f"no kernels for this GPU (compute capability {capability[0]}.{capability[1]})",
            f"name one with --arch: {', '.join(architectures())}",
        )
    raise UsageError(
        "no GPU here to choose the architecture by",
        f"name one with --arch: {', '.join(architectures())}",
    )
