"""One interface for every way of rounding a weight to its format."""

from __future__ import annotations

from torch import Tensor

from quantkit.errors import UsageError
from quantkit.pack.rtn import round_nearest
from quantkit.pack.scheme import SiteFormat

METHODS = ("rtn",)

PackedLinear = dict[str, Tensor]  # the main path's tensors by name, see pack/layout.py


def round_weight(
    w: Tensor,
    fmt: SiteFormat,
    *,
    method: str = "rtn",
    hessian: Tensor | None = None,
    rule: str = "even",
    divisor: Tensor | None = None,
) -> PackedLinear:
    """Round `w` [out, in], already without its separated channels and rotated, to `fmt`.

    `hessian` [in, in] is the second moment of the inputs as they are at run time, for methods
    that use it; `divisor` the global scale that a fused group shares (NVFP4).
    """
    if method == "rtn":
        return round_nearest(w, fmt, rule, divisor)
    raise UsageError(f"unknown rounding {method!r}", f"one of {', '.join(METHODS)}")
