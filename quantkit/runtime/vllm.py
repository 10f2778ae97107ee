"""vLLM serves packed checkpoints: `quant_method: quantkit`, registered through its plugin group.

vLLM imports this module in each of its processes and calls `register`. Fused linears (qkv, gate and
up) are one site, so they have one format. Split by outputs, a rank has its rows and the whole
branch; split by inputs, its slice of the branch (`slices.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from quantkit.checkpoint.measure import KINDS
from quantkit.errors import UsageError
from quantkit.kernels import dispatch, reference
from quantkit.pack import scheme as schemes
from quantkit.pack.layout import channels_of, tensors_of
from quantkit.pack.scheme import Scheme, SiteFormat
from quantkit.runtime.site import for_kernels
from quantkit.runtime.slices import check_slices, slice_branch

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class QuantkitConfig(QuantizationConfig):
    """The `quantization_config` object of a packed checkpoint."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    @classmethod
    def get_name(cls) -> str:
        """What `quant_method` says."""
        return schemes.METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of activations that kernels and the reference take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: where no kernel fits, the reference runs and says so."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantkitConfig:
        """Check and read the object; InputRejected when it is not understood."""
        scheme = schemes.from_json(config)
        if scheme.head is not None or scheme.embedding is not None:
            raise UsageError(
                "a packed head or embedding is not served by vLLM yet",
                "pack the checkpoint without --head and --embedding",
            )
        return cls(scheme)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer computes: packed, as it is, or (not a linear) its own business."""
        if not isinstance(layer, layers.LinearBase):
            if re.search(r"\.experts$", prefix) and self._packs_experts():
                raise UsageError(f"{prefix}: packed mixtures are not served by vLLM yet")
            return None
        fmt, site = self.site(prefix)
        if fmt is None:
            return layers.UnquantizedLinearMethod()
        return QuantkitLinearMethod(fmt, self.scheme.scale_rule, site)

    def site(self, prefix: str) -> tuple[SiteFormat | None, str]:
        """Format and key of the site that module `prefix` reads: fused or not; None: not packed."""
        found, leaf = _LAYER.search(prefix), prefix.rpartition(".")[2]
        kind = next((kind for kind, leaves in KINDS.items() if leaf in leaves), None)
        if found is None or kind is None or ".experts." in prefix:
            return None, prefix
        key = f"layers.{found[1]}.{kind}"
        return self.scheme.site(key, kind), key

    def _packs_experts(self) -> bool:
        used = (*self.scheme.sites.items(), *self.scheme.overrides.items())
        return any(fmt is not None and "mlp" in key for key, fmt in used)


class QuantkitLinearMethod(layers.LinearMethodBase):
    """A packed linear, or several that share their input, on one rank."""

    def __init__(self, fmt: SiteFormat, rule: str, site: str) -> None:
        self.format, self.rule, self.site = fmt, rule, site

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors, by their names, as this rank holds them."""
        slices = input_size // input_size_per_partition
        check_slices(self.format, input_size, slices, self.site)
        layer.quantkit_outputs = list(output_partition_sizes)
        layer.quantkit_slices, layer.quantkit_dtype = slices, params_dtype
        load = extra_weight_attrs["weight_loader"]
        rows, count = sum(output_partition_sizes), len(output_partition_sizes)
        tensors = tensors_of(self.format, rows, input_size_per_partition, params_dtype)
        for name, (dtype, shape) in tensors.items():
            parameter: Any
            if name.endswith("global_scale"):  # one for each of the linears
                empty = torch.empty(count, dtype=dtype)
                parameter = PerTensorScaleParameter(data=empty, weight_loader=load)
            elif name == "outlier_index":  # the same for all of them, and all of it on each rank
                parameter = BasevLLMParameter(
                    data=torch.empty(shape, dtype=dtype), weight_loader=load
                )
            elif name.startswith("outlier"):  # all columns on each rank, until they are sliced
                parameter = ChannelQuantScaleParameter(
                    data=torch.empty(shape, dtype=dtype), output_dim=0, weight_loader=load
                )
            else:
                kind = GroupQuantScaleParameter if name == "weight_scale" else ModelWeightParameter
                parameter = kind(
                    data=torch.empty(shape, dtype=dtype),
                    input_dim=1,
                    output_dim=0,
                    weight_loader=load,
                )
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose what computes the layer and hand it the tensors; they leave the layer."""
        names = tuple(tensors_of(self.format, 0, 0))
        if not names or names[0] not in layer._parameters:
            return  # done before
        tensors = {name: getattr(layer, name).data for name in names}
        fmt = self.format
        outputs, slices = layer.quantkit_outputs, layer.quantkit_slices
        width = layer.input_size
        if slices > 1 and fmt.branch is not None:
            tensors, fmt = slice_branch(tensors, fmt, width, slices, layer.tp_rank)
        for name in names:
            delattr(layer, name)
        # A bias that vLLM adds elsewhere (later, or on another rank) is not ours to add.
        bias = getattr(layer, "bias", None)
        if bias is not None and (layer.skip_bias_add or (slices > 1 and layer.tp_rank > 0)):
            bias = None
        layer.quantkit = PackedLayer(
            self.site,
            _split(tensors, outputs),
            fmt,
            self.rule,
            width // slices,
            outputs,
            layer.quantkit_dtype,
            None if bias is None else bias.data,
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [.., in of this rank] -> [.., out of this rank]."""
        return layer.quantkit(x, bias)


class PackedLayer(nn.Module):
    """The linears of a layer on one rank: a kernel's own layout of them, or decoded weights."""

    weight: Tensor
    channels: Tensor | None
    divisor: Tensor | None

    def __init__(
        self,
        site: str,
        linears: list[dict[str, Tensor]],
        fmt: SiteFormat,
        rule: str,
        width: int,
        outputs: list[int],
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.format, self.rule, self.outputs = fmt, rule, outputs
        work = dispatch.Work(
            weights=fmt.weights,
            activations=fmt.activations,
            branch=fmt.branch,
            rule=rule,
            hadamard=fmt.hadamard,
            width=width,
            outputs=tuple(outputs),
            outliers=fmt.outliers,
            dtype=dtype,
        )
        parts = [for_kernels(tensors) for tensors in linears]
        if bias is not None:
            rows = bias.split(outputs)
            parts = [part | {"bias": row} for part, row in zip(parts, rows, strict=True)]
        device = next(iter(linears[0].values())).device
        self.kernel = dispatch.prepare(site, work, parts, device)
        if self.kernel is None:
            compute = reference.compute_dtype(dtype)
            decoded = [reference.weight_operand(tensors, fmt, compute) for tensors in linears]
            self.register_buffer("weight", torch.cat(decoded), persistent=False)
            self.register_buffer("channels", channels_of(linears[0]), persistent=False)
            divisor = linears[0].get("input_global_scale")
            self.register_buffer("divisor", divisor, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [.., in] -> [.., out]; a kernel holds its bias already."""
        if self.kernel is not None:
            y = self.kernel(x.reshape(-1, x.shape[-1]))
            return y.reshape(*x.shape[:-1], sum(self.outputs))
        operand = reference.input_operand(x, self.format, self.rule, self.channels, self.divisor)
        return reference.linear(operand, self.weight, bias, x.dtype)


def _split(tensors: Mapping[str, Tensor], outputs: list[int]) -> list[dict[str, Tensor]]:
    """The tensors of each linear of a fused layer, by the names of pack/layout.py."""
    linears: list[dict[str, Tensor]] = [{} for _ in outputs]
    for name, tensor in tensors.items():
        if name == "outlier_index":
            parts: tuple[Tensor, ...] = (tensor,) * len(outputs)
        else:
            parts = tensor.split([1] * len(outputs) if name.endswith("global_scale") else outputs)
        for linear, part in zip(linears, parts, strict=True):
            linear[name] = part
    return linears


def register() -> None:
    """Make the method known to vLLM; again, and in every process, is harmless."""
    if QuantkitLinearMethod.__name__ not in layers.WEIGHT_LOADER_V2_SUPPORTED:
        layers.WEIGHT_LOADER_V2_SUPPORTED.append(QuantkitLinearMethod.__name__)
    if schemes.METHOD not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(schemes.METHOD)(QuantkitConfig)
