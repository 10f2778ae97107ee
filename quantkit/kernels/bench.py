"""Time packed linears against torch's bfloat16 and FP8 GEMMs on this GPU, weights cold in L2.

A measurement is a CUDA graph of a chain of calls, each on its own copy of the weights, so that
nothing of them is left in L2 from the call before, and no launch waits for the host. `chain` is
activation quantization and GEMM, `gemm` the GEMM alone on operands quantized before. FP8 is the
best of torch's scaled_mm variants, with its own per-token quantization in the chain; the peer
`humming` is W4A8 of humming-kernels, which need not be installed. Our launches
overlap as they do in a model (programmatic dependent launch); `benchmarks/gemm.py` times both ways.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from quantkit import console
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import mxfp4, mxfp8, nvfp4
from quantkit.kernels import dispatch
from quantkit.kernels.capability import PAIRS

SHAPES = ((6144, 4096), (4096, 12288), (24576, 4096), (8192, 28672), (57344, 8192))
COLD_BYTES = 512 << 20  # weights a chain passes over: several times any L2
MOST_COPIES = 48
Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class Options:
    """What to time: (outputs, width) shapes, token counts, formats, branch, peers."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = (1, 16, 64)
    weights: str = "mxfp4"
    activations: str = "mxfp4"
    branch: str | None = None  # None, "bf16", "fp8"
    group: int = 32  # one outlier channel of each such group
    peers: tuple[str, ...] = ("bf16", "fp8")
    repeats: int = 15
    bandwidth: float | None = None  # bytes a second of the roofline; None: measured by a copy


def graph_time(
    calls: Sequence[Callable[[], object]], repeats: int = 15, rest: float = 0.0
) -> float:
    """Return the median microseconds of a call over replays of a CUDA graph of all `calls`.

    Products of many tokens reach a GPU's power limit, and what is timed after them starts with a
    lower clock: `rest` seconds of idleness before the replays give every kernel the same start.
    """
    torch.cuda.synchronize()  # warm-up below runs on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    if rest:
        torch.cuda.synchronize()
        time.sleep(rest)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def run(options: Options) -> dict[str, Any]:
    """Measure every cell on the current CUDA device. Raises UsageError without one."""
    check(options)
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise UsageError("bench needs a CUDA device", "quantkit doctor says what runs here")
    device = torch.device("cuda", torch.cuda.current_device())
    timer: Timer = lambda calls: graph_time(calls, options.repeats)  # noqa: E731
    bandwidth = options.bandwidth or copy_bandwidth(timer, device)
    with torch.inference_mode():
        cells = list(measure(options, device, timer, bandwidth))
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "bandwidth": bandwidth,
        "weights": options.weights,
        "activations": options.activations,
        "branch": options.branch,
        "group": options.group if options.branch else None,
        "cells": cells,
    }


def check(options: Options) -> None:
    """Raise UsageError for a format, branch or peer that does not exist."""
    if (options.weights, options.activations) not in PAIRS:
        pairs = ", ".join(w if w == a else f"{w},{a}" for w, a in PAIRS)
        raise UsageError(
            f"unknown format {options.weights},{options.activations}", f"formats: {pairs}"
        )
    if options.branch not in (None, "bf16", "fp8"):
        raise UsageError(f"unknown branch {options.branch!r}", "branches: none, bf16, fp8")
    for peer in options.peers:
        if peer not in PEERS:
            raise UsageError(f"unknown peer {peer!r}", f"peers: {', '.join(PEERS)}, or none")


def measure(
    options: Options, device: torch.device, timer: Timer, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Yield one cell a shape and token count; times in microseconds."""
    for outputs, width in options.shapes:
        work, tensors = packed_linear(options, outputs, width, device)
        prepared: Any = dispatch.prepare(f"bench {outputs}x{width}", work, [tensors], device)
        if prepared is None:
            reason = dispatch.choose(work, device).reason
            raise QuantkitError(f"no kernel to time: {reason}", "quantkit doctor says what runs")
        name = dispatch.choose(work, device).name
        own_bytes = sum(tensor.nbytes for tensor in tensors.values())
        modules: list[Any] = copies(prepared, own_bytes)
        bench_peers = {peer: PEERS[peer](outputs, width, device) for peer in options.peers}
        for tokens in options.tokens:
            x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
            times = {"chain": timer([partial(module, x) for module in modules])}
            if hasattr(prepared, "multiply"):
                operands = prepared.quantize(x)
                times["gemm"] = timer([partial(module.multiply, *operands) for module in modules])
            moved = own_bytes + 2 * tokens * (width + outputs)
            yield {
                "outputs": outputs,
                "width": width,
                "tokens": tokens,
                "kernel": name,
                "us": times,
                "roofline_us": moved / bandwidth * 1e6,
                "peers": {peer: calls(x, timer) for peer, calls in bench_peers.items()},
            }


def packed_linear(
    options: Options, outputs: int, width: int, device: torch.device
) -> tuple[dispatch.Work, dict[str, Tensor]]:
    """Return a random packed linear [outputs, width] and what it computes."""
    generator = torch.Generator(device).manual_seed(outputs + width)
    tensors = packed_weight(options.weights, outputs, width, device, generator)
    outliers = 0
    if options.branch is not None:
        channels = torch.arange(0, width, options.group, dtype=torch.int32, device=device)
        channels = pad(channels, (0, -len(channels) % 16), value=-1)
        outliers = len(channels)
        branch = torch.randn(outputs, outliers, device=device, generator=generator)
        branch = branch.where(channels >= 0, 0)
        tensors["outlier_index"] = channels
        tensors["outlier_weight"] = branch.to(torch.bfloat16)
        if options.branch == "fp8":
            tensors["outlier_weight"] = branch.to(torch.float8_e4m3fn)
            tensors["outlier_weight_scale"] = torch.ones(outputs, 1, device=device)
    if options.activations == "nvfp4":
        tensors["input_global_scale"] = torch.full((1,), 448.0, device=device)
    work = dispatch.Work(
        options.weights, options.activations, options.branch, "even", None, width, (outputs,),
        outliers,
    )  # fmt: skip
    return work, tensors


def packed_weight(
    name: str, outputs: int, width: int, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    parts: list[tuple[Tensor, ...]] = []
    rows = max(1, (64 << 20) // width)  # quantizing the whole weight at once would take gigabytes
    divisor = torch.full((1,), 448.0, device=device)
    for start in range(0, outputs, rows):
        count = min(rows, outputs - start)
        weight = torch.randn(count, width, device=device, generator=generator)
        if name == "nvfp4":
            parts.append(nvfp4.quantize(weight, divisor)[:2])
        else:
            parts.append((mxfp4 if name == "mxfp4" else mxfp8).quantize(weight, "even"))
    codes, scales = (
        torch.cat([p.view(torch.uint8) for p in kind]) for kind in zip(*parts, strict=True)
    )
    if name == "mxfp8":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    tensors = {"weight_packed": codes, "weight_scale": scales}
    if name == "nvfp4":
        tensors["weight_scale"] = scales.view(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = divisor
    return tensors


def copies(module: nn.Module, own_bytes: int) -> list[nn.Module]:
    """The module and as many copies as keep its weights out of L2 from call to call."""
    count = min(MOST_COPIES, max(2, -(-COLD_BYTES // own_bytes)))
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def copy_bandwidth(timer: Timer, device: torch.device) -> float:
    """Bytes a second a plain copy moves, reads and writes counted: the best of two kernels."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    kernels = (partial(target.copy_, source), partial(torch.bitwise_not, source, out=target))
    return 2 * source.nbytes / (min(timer([kernel]) for kernel in kernels) * 1e-6)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, anew for every shape, past the eight it would stop at too."""
    torch._dynamo.config.recompile_limit = 1 << 10
    torch._dynamo.config.accumulated_recompile_limit = 1 << 10
    return torch.compile(function, dynamic=False)


PeerCalls = Callable[[Tensor, Timer], dict[str, float]]


def _bf16(outputs: int, width: int, device: torch.device) -> PeerCalls:
    count = min(MOST_COPIES, max(2, -(-COLD_BYTES // (outputs * width * 2))))
    weights = [
        torch.randn(outputs, width, device=device, dtype=torch.bfloat16) for _ in range(count)
    ]

    def calls(x: Tensor, timer: Timer) -> dict[str, float]:
        time = timer([partial(linear, x, weight) for weight in weights])
        return {"chain": time, "gemm": time}

    return calls


@cache
def _fp8_quantizer() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x [M, K] to E4M3 and a scale a token, compiled."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True).float() / 448
        return (x / scale).to(torch.float8_e4m3fn), scale

    return compiled(quantize)


def _fp8(outputs: int, width: int, device: torch.device) -> PeerCalls:
    """torch's W8A8: one scale a tensor or one a row, fast accumulation on and off; the best."""
    count = min(MOST_COPIES, max(2, -(-COLD_BYTES // (outputs * width))))
    weights = [
        torch.randn(outputs, width, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        for _ in range(count)
    ]
    one = torch.ones((), device=device)
    rows = torch.ones(1, outputs, device=device)

    quantize = _fp8_quantizer()

    def calls(x: Tensor, timer: Timer) -> dict[str, float]:
        codes, scale = quantize(x)

        def multiply(codes: Tensor, scale: Tensor, weight: Tensor, fast: bool, row: bool) -> Tensor:
            return torch._scaled_mm(
                codes,
                weight.T,
                scale_a=scale if row else one,
                scale_b=rows if row else one,
                out_dtype=torch.bfloat16,
                use_fast_accum=fast,
            )

        def both(fast: bool, weight: Tensor) -> Tensor:
            return multiply(*quantize(x), weight, fast, True)

        found: dict[tuple[bool, bool], float] = {}
        for fast, row in itertools.product((True, False), repeat=2):
            try:
                found[fast, row] = timer(
                    [partial(multiply, codes, scale, weight, fast, row) for weight in weights]
                )
            except RuntimeError as error:  # a variant this torch or GPU does not have
                console.note(f"fp8 {fast=} {row=}: {str(error).splitlines()[0]}")
        if not found:
            raise QuantkitError("torch has no scaled_mm for this GPU", "leave fp8 out of --peers")
        best = min(found, key=lambda variant: found[variant])
        chain = timer([partial(both, best[0], weight) for weight in weights])
        return {"chain": chain, "gemm": found[best]}

    return calls


def _humming(outputs: int, width: int, device: torch.device) -> PeerCalls:
    """humming-kernels' W4A8, where it is installed."""
    from quantkit.kernels import bench_humming

    return bench_humming.peer(outputs, width, device)


PEERS: dict[str, Callable[[int, int, torch.device], PeerCalls]] = {
    "bf16": _bf16,
    "fp8": _fp8,
    "humming": _humming,
}


def write(found: dict[str, Any], path: Path) -> None:
    """Write the result of `run` as JSON."""
    path.write_text(json.dumps(found, indent=2) + "\n")


def as_text(found: dict[str, Any]) -> str:
    """Lay the result of `run` out as a table; ratios are the peer's time over ours."""
    rows = []
    for cell in found["cells"]:
        us = cell["us"]
        best = us.get("gemm", us["chain"])
        rows.append(
            [
                f"{cell['outputs']}, {cell['width']}",
                cell["tokens"],
                f"{us['gemm']:.1f}" if "gemm" in us else "-",
                f"{us['chain']:.1f}",
                f"{100 * cell['roofline_us'] / best:.0f}%",
                *(
                    f"{peer[kind] / us[kind]:.2f}" if kind in us else "-"
                    for peer in cell["peers"].values()
                    for kind in ("gemm", "chain")
                ),
            ]
        )
    peers = list(found["cells"][0]["peers"]) if found["cells"] else []
    headers = ["N, K", "M", "gemm us", "chain us", "roofline"]
    headers += [f"{peer} {kind} x" for peer in peers for kind in ("gemm", "chain")]
    branch = f", {found['branch']} branch 1/{found['group']}" if found["branch"] else ""
    title = (
        f"{found['device']}, {found['weights']} x {found['activations']}{branch}, "
        f"{found['cells'][0]['kernel'] if found['cells'] else '-'}, "
        f"copy {found['bandwidth'] / 1e12:.2f} TB/s"
    )
    return f"{title}\n\n{console.table(headers, rows)}"
