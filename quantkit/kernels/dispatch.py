"""Choose what computes a packed linear, say it once, and remember it for reports.

A kernel module (named by its row in `capability`) has two functions:

    refuse(kernel, work) -> str | None        why it cannot run these shapes, None when it can
    prepare(kernel, work, linears) -> Module  one-time layout change; forward: x [M, K] -> [M, N]

`linears` are the packed linears that read one site (q, k, v; gate, up), as mappings of checkpoint
tensor names (`weight_packed`, `weight_scale`, `outlier_weight`, `outlier_index`, `bias`, ...).
They share one activation quantization, and N is the sum of their outputs, in order. A module may
offer its two halves, `quantize(x) -> operands` and `multiply(*operands)`, to be timed apart, and
`gated(gate_up [M, 2 K]) -> [M, N]`, the same as forward(silu(gate) * up) without that product in
memory, and `normed(x, gain, epsilon) -> [M, N]`, that of x's RMSNorm.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import console
from quantkit.errors import QuantkitError, UsageError
from quantkit.kernels import residual
from quantkit.kernels.capability import Kernel, find
from quantkit.pack.layout import check_index

REFERENCE = "reference"


@dataclass(frozen=True)
class Work:
    """What one site computes: formats by name, the rule of dynamic scales, and its extents."""

    weights: str
    activations: str
    branch: str | None  # None, "bf16", "fp8", "residual"
    rule: str  # of dynamic activation scales
    hadamard: Mapping[str, int] | None  # {"block": 32} or {"size": n}, on the remainder
    width: int  # input channels, K
    outputs: tuple[int, ...]  # rows of each linear
    outliers: int = 0  # branch columns, padding included; those of a residual follow K
    dtype: torch.dtype = torch.bfloat16  # of activations and results


@dataclass(frozen=True)
class Choice:
    """The kernel for some work, or None (the reference) and the reason."""

    kernel: Kernel | None
    reason: str = ""

    @property
    def name(self) -> str:
        """What reports print."""
        return self.kernel.name if self.kernel else REFERENCE


_ran: dict[str, dict[str, str]] = {}
_said: set[str] = set()


def choose(work: Work, device: torch.device) -> Choice:
    """Return the kernel for `work` on `device`; compiles nothing and says nothing.

    `QUANTKIT_KERNEL=reference` forces the reference; any other value but `auto` is a UsageError.
    """
    wanted = os.environ.get("QUANTKIT_KERNEL", "auto")
    if wanted == REFERENCE:
        return Choice(None, "QUANTKIT_KERNEL=reference")
    if wanted != "auto":
        raise UsageError(
            f"QUANTKIT_KERNEL={wanted!r} names no kernel", "set it to auto or reference"
        )
    if work.dtype not in (torch.bfloat16, torch.float16):
        return Choice(None, f"kernels compute in bfloat16 and float16, not {work.dtype}")
    if work.branch == "residual":
        work = residual.widened(work)
    gpu = capability(device)
    found = find(work.weights, work.activations, work.branch, gpu)
    if isinstance(found, str):
        return Choice(None, found)
    reason = _module(found).refuse(found, work)
    return Choice(None, reason) if reason else Choice(found)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA device, None for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def prepare(
    site: str, work: Work, linears: Sequence[Mapping[str, Tensor]], device: torch.device
) -> nn.Module | None:
    """Return a module that computes the linears of `site` at once, None for the reference.

    The module holds everything it needs; the caller may free the checkpoint's tensors. A fall
    back to the reference is warned about once for each reason and recorded either way. Raises
    InputRejected when the linears' `outlier_index` names no channels of theirs.
    """
    for tensors in linears:
        check_index(tensors, work.width, site)
    choice = choose(work, device)
    prepared: nn.Module | None = None
    if choice.kernel is not None:
        try:
            module = _module(choice.kernel)
            if work.branch == "residual":
                inner = module.prepare(choice.kernel, residual.widened(work), linears)
                prepared = residual.ResidualLinear(work, linears, inner)
            else:
                prepared = module.prepare(choice.kernel, work, linears)
        except QuantkitError as error:  # no compiler, or it refused the source
            choice = Choice(None, error.message)
            _warn(error.message, error.hint)
    record(site, work, choice)
    return prepared


def record(site: str, work: Work, choice: Choice) -> None:
    """Remember what computes `site`; warn when it is the reference, once for each reason."""
    _ran[site] = {
        "formats": f"{work.weights} x {work.activations}",
        "branch": work.branch or "none",
        "kernel": choice.name,
        **({"reason": choice.reason} if choice.reason else {}),
    }
    if choice.kernel is None:
        _warn(choice.reason, None)


def _warn(reason: str, hint: str | None) -> None:
    if reason not in _said:
        _said.add(reason)
        tail = f"\nhint: {hint}" if hint else ""
        console.warn(f"packed linears run on the torch reference: {reason}{tail}")


def report() -> dict[str, dict[str, str]]:
    """Return, for each site prepared in this process, its formats, the kernel that ran, and why."""
    return dict(_ran)


def summary() -> dict[str, int]:
    """Return how many sites each kernel ran, for the last line of a report."""
    counts: dict[str, int] = {}
    for entry in _ran.values():
        counts[entry["kernel"]] = counts.get(entry["kernel"], 0) + 1
    return counts


def forget() -> None:
    """Forget recorded sites and warnings (a new model in the same process)."""
    _ran.clear()
    _said.clear()


def _module(kernel: Kernel) -> Any:
    return importlib.import_module(f"quantkit.kernels.{kernel.module}")
