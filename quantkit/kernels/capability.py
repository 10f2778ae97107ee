"""Which kernel runs which format on which GPU: one table, one row a kernel, one reason a refusal.

A kernel is added by its row here and a module of that name beside this file (see `dispatch`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """One row: formats it executes exactly, the GPU it is for, and the file that launches it."""

    name: str  # as every report prints it
    capability: tuple[int, int]  # compute capability of the GPU
    arch: str  # nvcc target
    weights: str
    activations: str
    branches: tuple[str | None, ...]  # 16-bit or FP8 branch forms it accumulates
    module: str  # quantkit.kernels.<module>
    nvcc: tuple[int, int]  # the oldest compiler that knows the instructions
    ran: bool  # whether its results were checked on that hardware


def _blackwell(gpu: str, capability: tuple[int, int], weights: str, activations: str) -> Kernel:
    return Kernel(
        name=f"{gpu} block-scaled",
        capability=capability,
        arch=f"{gpu.replace('sm', 'sm_')}a",
        weights=weights,
        activations=activations,
        branches=(None, "bf16", "fp8"),
        module="sm1xx_blockscaled",
        nvcc=(12, 8),
        ran=False,
    )


def _hopper_bf16(weights: str, activations: str) -> Kernel:
    return Kernel(
        name="sm90 bf16",
        capability=(9, 0),
        arch="sm_90a",
        weights=weights,
        activations=activations,
        branches=(None, "bf16", "fp8"),
        module="sm90_wide",
        nvcc=(12, 3),
        ran=True,
    )


KERNELS: tuple[Kernel, ...] = (
    _blackwell("sm100", (10, 0), "mxfp4", "mxfp4"),
    _blackwell("sm100", (10, 0), "mxfp4", "mxfp8"),
    _blackwell("sm100", (10, 0), "mxfp8", "mxfp8"),
    _blackwell("sm100", (10, 0), "nvfp4", "nvfp4"),
    _blackwell("sm120", (12, 0), "mxfp4", "mxfp4"),
    _blackwell("sm120", (12, 0), "mxfp4", "mxfp8"),
    _blackwell("sm120", (12, 0), "mxfp8", "mxfp8"),
    _blackwell("sm120", (12, 0), "nvfp4", "nvfp4"),
    Kernel(
        name="sm90 exact-fold",
        capability=(9, 0),
        arch="sm_90a",
        weights="mxfp4",
        activations="mxfp4",
        branches=(None, "bf16", "fp8"),
        module="sm90",
        nvcc=(12, 3),
        ran=True,
    ),
    _hopper_bf16("nvfp4", "nvfp4"),
    _hopper_bf16("mxfp4", "mxfp8"),
    _hopper_bf16("mxfp8", "mxfp8"),
)

GPUS = {(9, 0): "Hopper (H100, H200)", (10, 0): "Blackwell (B200)", (12, 0): "Blackwell (RTX)"}

# What packed checkpoints hold, in the order reports list it: weights, activations.
PAIRS = (
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp8"),
    ("mxfp8", "mxfp8"),
)


def find(
    weights: str,
    activations: str,
    branch: str | None,
    capability: tuple[int, int] | None,
) -> Kernel | str:
    """Return the kernel for a site's formats on a GPU, or why there is none.

    `capability` is the GPU's compute capability, None without a GPU.
    """
    if capability is None:
        return "no CUDA device"
    gpu = f"compute capability {capability[0]}.{capability[1]}"
    rows = [row for row in KERNELS if row.capability == capability]
    if not rows:
        return f"no kernel for {gpu} (only {', '.join(sorted({row.arch for row in KERNELS}))})"
    rows = [row for row in rows if (row.weights, row.activations) == (weights, activations)]
    if not rows:
        return f"no {weights} x {activations} kernel for {gpu}"
    for row in rows:
        if branch in row.branches:
            return row
    return f"{rows[0].name} has no {branch} branch"
