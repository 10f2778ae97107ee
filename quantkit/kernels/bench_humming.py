"""humming-kernels' W4A8 beside ours: MXFP4 weights, E4M3 activations with a scale a token.

The library is optional and compiles a kernel when a shape and number of tokens is first used. It
runs the tile it takes for this number itself, and launches that do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.formats import mxfp4
from quantkit.kernels import bench

PACKAGE = "humming-kernels"
CHECKED_ROWS = 512  # outputs that are compared with float32
MOST_ERROR = 1e-2  # of these, relative; rounding to bfloat16 alone makes 2e-3


def version() -> str | None:
    """The version installed, None without one. Imports nothing."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _one_line() -> Iterator[None]:
    """Make whatever the library raises a QuantkitError with the first line of it."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        line = (str(error).strip() or "no reason given").splitlines()[0]
        raise QuantkitError(
            f"{PACKAGE}: {type(error).__name__}: {line}", "leave humming out of --peers"
        ) from error


@_one_line()
def peer(outputs: int, width: int, device: torch.device) -> bench.PeerCalls:
    """Return a function of tokens x [M, width] and a timer that measures a random linear.

    It returns microseconds of `gemm`, on operands quantized before, and of `chain`, with the
    library's own quantizer, and `error`: of some outputs, relative to float32 on the same operands.
    Either raises QuantkitError where the library has no kernel, fails or computes something else.
    """
    if version() is None:
        raise QuantkitError(f"no {PACKAGE} here", f"pip install {PACKAGE}")
    from humming.forward import may_quant_input
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    generator = torch.Generator(device).manual_seed(outputs + width)
    packed, scales = bench.packed_weight("mxfp4", outputs, width, device, generator).values()
    some = mxfp4.dequantize(packed[:CHECKED_ROWS], scales[:CHECKED_ROWS])
    with device:
        layer: Any = HummingLayer(
            outputs,
            width,
            weight_config={"quant_method": "mxfp4"},
            input_config={"dtype": "float8e4m3"},
            torch_dtype=torch.bfloat16,
        )
    layer.load_from_tensors({"weight": packed, "weight_scale": scales})
    layer.transform()
    layers = bench.copies(layer, packed.nbytes + scales.nbytes)

    @_one_line()
    def calls(x: Tensor, timer: bench.Timer) -> dict[str, float]:
        tile = get_heuristics_config(layer.humming_config, shape_m=len(x), device=device)
        codes, scale = may_quant_input(layer.humming_config, x)
        y = layer(codes, input_scale=scale, tuning_config=tile)[:, :CHECKED_ROWS].float()
        expected = (codes.float() * scale) @ some.T
        error = float((y - expected).norm() / expected.norm())
        if not error < MOST_ERROR:
            raise QuantkitError(f"{PACKAGE}: {error:.1e} off the product of its operands")
        gemm = [partial(one, codes, input_scale=scale, tuning_config=tile) for one in layers]
        chain = [partial(one, x, tuning_config=tile) for one in layers]
        return {"gemm": timer(gemm), "chain": timer(chain), "error": error}

    return calls
