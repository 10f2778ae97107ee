"""Every GEMM figure in one run: decode, branches, prefill, chain, against torch's FP8 and bfloat16.

    python benchmarks/gemm.py --json gemm.json --markdown gemm.md

One NVIDIA GPU for which quantkit has an MXFP4 kernel. A time is microseconds a call in a CUDA graph
of calls on weights that are cold in L2 (see quantkit.kernels.bench). `plain` launches follow one
another as torch's do; `overlapped` ones start while the kernel before ends, as they do in a model.
Ratios are the best of torch's FP8 variants, launched plainly, over ours. Prefill reaches the GPU's
power limit, which slows whatever is timed next: there all timings start after REST seconds' rest.

`error` is relative to the float32 reference on the same packed numbers. Each cell is launched twice
and must give equal bits. `act` is the activation kernel alone on inputs that are cold as well, and
its share of the copy bandwidth. `--norms` adds the chain behind the RMSNorm before it in a model
(SwiGLU where outputs are fewer than inputs): compiled by torch as a kernel of its own, and inside
the activation kernel.

Where humming-kernels is installed its W4A8 is a peer too: MXFP4 weights and E4M3 activations, whose
launches do not overlap; `x W4A8` is its time over ours launched plainly, `x W4A8 chain` with each
one's quantizer. What a peer cannot do is said in its row.

`--candidates` also times the Hopper tiles that no plan takes yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from quantkit import console
from quantkit.errors import QuantkitError
from quantkit.kernels import bench, bench_humming, dispatch, jit, reference, sm90, sm90_tiles
from quantkit.pack.scheme import SiteFormat

BRANCHES = ((None, 0), ("bf16", 32), ("fp8", 64))  # branch, one outlier channel of so many
REST = 0.15  # seconds
ERROR_ROWS = 512  # outputs of each linear that are compared with the reference


def cells(
    options: argparse.Namespace, device: torch.device, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """One dictionary a shape, branch and number of tokens."""
    for outputs, width in options.shapes:
        peers = {
            name: attempt(name, partial(bench.PEERS[name], outputs, width, device))
            for name in options.peers
        }
        peer_times: dict[int, dict[str, dict[str, float]]] = {}
        for branch, group in BRANCHES:
            asked = bench.Options(branch=branch, group=group or 32)
            work, tensors = bench.packed_linear(asked, outputs, width, device)
            prepared: Any = dispatch.prepare(f"{outputs}x{width} {branch}", work, [tensors], device)
            if prepared is None:
                raise QuantkitError(f"no kernel to time: {dispatch.choose(work, device).reason}")
            own_bytes = sum(tensor.nbytes for tensor in tensors.values())
            modules = bench.copies(prepared, own_bytes)
            for tokens in options.tokens:
                if branch == "fp8" and tokens > sm90_tiles.PREFILL:
                    continue
                x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
                rest = REST if tokens > sm90_tiles.PREFILL else 0.0
                timer = partial(bench.graph_time, repeats=options.repeats, rest=rest)
                if tokens not in peer_times:
                    peer_times[tokens] = {
                        name: attempt(name, partial(calls, x, timer)) if callable(calls) else calls
                        for name, calls in peers.items()
                    }
                moved = own_bytes + 2 * tokens * (width + outputs)
                yield {
                    "outputs": outputs,
                    "width": width,
                    "tokens": tokens,
                    "branch": branch,
                    "group": group,
                    "kernel": dispatch.choose(work, device).name,
                    "us": times(modules, x, timer),
                    "norm": with_norm(modules, x, outputs, timer) if options.norms else {},
                    "activation_bytes": x.nbytes + prepared.quantize(x)[0].nbytes,
                    "roofline_us": moved / bandwidth * 1e6,
                    "peers": peer_times[tokens],
                    "candidates": dict(candidates(modules, x, timer)) if options.candidates else {},
                    **correctness(prepared, work, tensors, x),
                }
            del prepared, modules, tensors
            gc.collect()


def attempt(name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns, or why this peer cannot do it: the run goes on without."""
    try:
        return call()
    except QuantkitError as error:
        console.note(f"{name}: {error.message}")
        return {"failed": error.message}


def times(modules: list[Any], x: Tensor, timer: bench.Timer) -> dict[str, float]:
    """The GEMM alone, launched plainly and overlapped, and after its activation kernel."""
    operands = modules[0].quantize(x)
    products = [partial(module.multiply, *operands) for module in modules]
    found = alone(products, timer)
    found["chain"] = timer([partial(module, x) for module in modules])
    cold = [x.clone() for _ in range(min(bench.MOST_COPIES, 2 + bench.COLD_BYTES // x.nbytes))]
    found["activation"] = timer([partial(modules[0].quantize, other) for other in cold])
    return found


def alone(products: list[Callable[[], Tensor]], timer: bench.Timer) -> dict[str, float]:
    """The GEMM by itself, launched both ways."""
    found = {"overlapped": timer(products)}
    sm90.OVERLAP = False
    try:
        found["plain"] = timer(products)
    finally:
        sm90.OVERLAP = True
    return found


@bench.compiled
def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return gain * wide.to(x.dtype)


@bench.compiled
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def with_norm(modules: list[Any], x: Tensor, outputs: int, timer: bench.Timer) -> dict[str, float]:
    """The chain after what a model has in front of it, in a kernel of its own and in ours."""
    inputs: tuple[Tensor, ...]
    if outputs > x.shape[1]:  # reads the residual
        inputs, before = (x, torch.ones_like(x[0])), rms_norm
        ours = [partial(module.normed, *inputs, 1e-6) for module in modules]
    else:
        inputs, before = (torch.cat([x, x], 1),), swiglu
        ours = [partial(module.gated, *inputs) for module in modules]
    apart = lambda module: module(before(*inputs))  # noqa: E731
    return {"apart": timer([partial(apart, m) for m in modules]), "fused": timer(ours)}


def candidates(
    modules: list[Any], x: Tensor, timer: bench.Timer
) -> Iterator[tuple[str, dict[str, float]]]:
    """Times of tiles that no plan takes, and whether they give what the planned tile gives."""
    operands = modules[0].quantize(x)
    products = [partial(module.multiply, *operands) for module in modules]
    expected = products[0]()
    for tile in sm90_tiles.CANDIDATES:
        module, sms = modules[0], sm90._multiprocessors(x.device.index)
        suits = sm90_tiles.suits(tile, module.outputs, module.width, len(x), sms)
        if tile.tokens != sm90_tiles.token_tile(len(x)) or not suits:
            continue
        with sm90_tiles.trying(tile):
            try:
                y = products[0]()
                found = alone(products, timer)
            except QuantkitError as error:
                console.note(f"{tile}: {error.message}")
                continue
        difference = (y.float() - expected.float()).norm() / expected.float().norm()
        yield str(tile), {**found, "difference": float(difference)}


def correctness(
    module: Any, work: dispatch.Work, tensors: dict[str, Tensor], x: Tensor
) -> dict[str, Any]:
    """Relative error against the reference on some outputs, and whether a repeat gives the same."""
    y = module(x)
    rows = slice(0, ERROR_ROWS)
    some = {n: t if n == "outlier_index" else t[rows] for n, t in tensors.items()}
    fmt = SiteFormat("mxfp4", "mxfp4", work.branch, 32, work.outliers)
    expected = reference.packed_linear(x.float(), some, fmt, work.rule)
    error = (y[:, rows].float() - expected).norm() / expected.norm()
    return {"error": float(error), "repeats": bool(torch.equal(y, module(x)))}


def ratio(cell: dict[str, Any], ours: str, peer: str = "fp8", theirs: str = "gemm") -> str:
    """The peer's time over ours."""
    times = cell["peers"].get(peer, {})
    return f"{times[theirs] / cell['us'][ours]:.2f}" if theirs in times else "-"


def microseconds(cell: dict[str, Any], peer: str) -> str:
    """The peer's GEMM alone, or why there is none."""
    times = cell["peers"].get(peer, {})
    why = times.get("failed", "-").replace("|", "/")[:80]  # the JSON has it whole
    return f"{times['gemm']:.1f}" if "gemm" in times else why


def as_table(found: dict[str, Any], layout: Any) -> str:
    """`layout(headers, rows)` of every cell."""
    headers = ["N, K", "M", "branch", "FP8 us", "plain us", "overlapped us", "x plain"]
    headers += ["x overlapped", "roofline", "chain us", "x chain", "x bf16", "act us", "act"]
    humming = "humming" in found["cells"][0]["peers"]
    headers += ["W4A8 us", "x W4A8", "x W4A8 chain"] if humming else []
    headers += ["with norm us", "fused us"] if found["cells"][0]["norm"] else []
    headers.append("error")
    rows = []
    for cell in found["cells"]:
        us = cell["us"]
        share = cell["roofline_us"] / us["plain"]
        quantizer = cell["activation_bytes"] / found["bandwidth"] * 1e6 / us["activation"]
        rows.append(
            [
                f"{cell['outputs']}, {cell['width']}",
                cell["tokens"],
                f"{cell['branch']} 1/{cell['group']}" if cell["branch"] else "none",
                microseconds(cell, "fp8"),
                f"{us['plain']:.1f}",
                f"{us['overlapped']:.1f}",
                ratio(cell, "plain"),
                ratio(cell, "overlapped"),
                f"{100 * share:.0f}%" if cell["tokens"] <= sm90_tiles.PREFILL else "-",
                f"{us['chain']:.1f}",
                ratio(cell, "chain", theirs="chain"),
                ratio(cell, "plain", "bf16"),
                f"{us['activation']:.1f}",
                f"{100 * quantizer:.0f}%",
                *(w4a8(cell) if humming else ()),
                *(f"{cell['norm'][how]:.1f}" for how in ("apart", "fused") if cell["norm"]),
                f"{cell['error']:.1e}" + ("" if cell["repeats"] else " not repeatable"),
            ]
        )
    return layout(headers, rows)


def w4a8(cell: dict[str, Any]) -> tuple[str, str, str]:
    """humming-kernels' time, and it over ours: GEMMs launched plainly, as theirs is, and chains."""
    chain = ratio(cell, "chain", "humming", "chain")
    return microseconds(cell, "humming"), ratio(cell, "plain", "humming"), chain


def tried(found: dict[str, Any]) -> list[str]:
    """A line for each candidate: its time over that of the planned tile."""
    lines = []
    for cell in found["cells"]:
        for tile, us in cell["candidates"].items():
            lines.append(
                f"{cell['outputs']}, {cell['width']}, M {cell['tokens']}, {cell['branch']}: {tile} "
                f"{us['plain']:.1f} us, {us['overlapped']:.1f} overlapped "
                f"(planned {cell['us']['plain']:.1f}, {cell['us']['overlapped']:.1f}), "
                f"difference {us['difference']:.1e}"
            )
    return lines


def markdown(headers: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def title(found: dict[str, Any]) -> str:
    """Where and against what."""
    others = f", W4A8 of humming-kernels {found['humming']}" if found["humming"] else ""
    return (
        f"{found['device']}, torch {found['torch']}, MXFP4 x MXFP4{others}, copies at "
        f"{found['bandwidth'] / 1e12:.2f} TB/s"
    )


def build(tiles: Sequence[sm90_tiles.Tile]) -> None:
    """Compile what will be timed, on all cores, before the GPU has to wait for it."""
    texts = [sm90_tiles.gemm_text(t, "mxfp4", branch) for t in tiles for branch, _ in BRANCHES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda text: jit.compile(text, "sm90_gemm", sm90.ARCH), texts))


def default_peers() -> list[str]:
    """torch's, and humming-kernels' where it is installed."""
    return ["fp8", "bf16", *(["humming"] if bench_humming.version() else [])]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--shape", type=numbers, action="append", dest="shapes", metavar="N,K")
    parser.add_argument("--tokens", type=numbers, default=(1, 8, 16, 32, 64, 2048, 8192))
    parser.add_argument("--peers", type=lambda text: text.split(","), default=default_peers())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--norms", action="store_true", help="also time the chain behind a norm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.shapes = options.shapes or bench.SHAPES
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    timer = partial(bench.graph_time, repeats=options.repeats)
    if dispatch.capability(device) == (9, 0):
        build((*sm90_tiles.TILES, *(sm90_tiles.CANDIDATES if options.candidates else ())))
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "humming": bench_humming.version() if "humming" in options.peers else None,
        "bandwidth": bench.copy_bandwidth(timer, device),
        "cells": [],
    }
    with torch.inference_mode():
        for cell in cells(options, device, found["bandwidth"]):
            found["cells"].append(cell)
            console.note(
                f"{cell['outputs']}, {cell['width']}, M {cell['tokens']}, {cell['branch']}: "
                f"{cell['us']['plain']:.1f} us, x{ratio(cell, 'plain')} of FP8"
            )
            if options.json:  # what is there so far outlives an interruption
                options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.markdown:
        text = f"{title(found)}\n\n{as_table(found, markdown)}\n"
        options.markdown.write_text(text)
    print(f"{title(found)}\n\n{as_table(found, console.table)}", *tried(found), sep="\n")


if __name__ == "__main__":
    main()
