"""NVIDIA Model Optimizer's layout of NVFP4: what TensorRT-LLM, vLLM and SGLang read as `modelopt`.

Per linear: `weight` uint8 [out, in/2] (even column in the low nibble), `weight_scale` float8_e4m3fn
[out, in/16], and the float32 scalars `weight_scale_2` and `input_scale`, which multiply where
compressed-tensors' global scales divide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit import __version__
from quantkit.model.sites import ModelLayout
from quantkit.pack.scheme import Scheme, SiteFormat

METHOD = "modelopt"
FILE = "hf_quant_config.json"
BLOCK = 16
NAMES = {
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}


def can_describe(fmt: SiteFormat) -> bool:
    """Whether Model Optimizer has a layout for the site's format (as quantkit writes it)."""
    return fmt.plain and fmt.weights == "nvfp4" and fmt.activations == "nvfp4"


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain NVFP4 linear's tensors under Model Optimizer's names; no number is rounded.

    The divisors are powers of two, so their reciprocals are exact.
    """
    return {
        NAMES[name]: 1 / tensor.reshape(()) if name.endswith("global_scale") else tensor
        for name, tensor in tensors.items()
    }


def is_exact(divisor: Tensor) -> bool:
    """Whether a global scale has an exact reciprocal in float32."""
    return bool((torch.frexp(divisor.float())[0] == 0.5).all())


def write_config(scheme: Scheme, layout: ModelLayout) -> tuple[dict[str, Any], bytes]:
    """`quantization_config` of config.json, and the bytes of hf_quant_config.json."""
    left = [
        linear.module
        for site in layout.sites
        for linear in (
            *(site.linears if scheme.site(site.key, site.kind) is None else ()),
            *site.unquantized,
        )
    ]
    ignore = sorted({"lm_head", layout.embedding.removesuffix(".weight"), *left})
    # vLLM tells the layout by this name; the version says who really wrote the file.
    producer = {"name": METHOD, "version": f"quantkit-{__version__}"}
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    section = {
        "config_groups": {
            "group_0": {
                "input_activations": dict(arguments),
                "weights": dict(arguments),
                "targets": ["Linear"],
            }
        },
        "ignore": ignore,
        "quant_algo": "NVFP4",
        "producer": producer,
        "quant_method": METHOD,
    }
    file = {
        "producer": producer,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": ignore,
        },
    }
    return section, (json.dumps(file, indent=4) + "\n").encode()
