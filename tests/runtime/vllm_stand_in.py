"""A stand-in for the part of vLLM that the plugin meets, with vLLM's names and signatures.

`vllm_signatures.json` lists the signatures as published (vLLM 0.33.0); a test holds this module to
it, and, where vLLM itself can be imported, holds the list to vLLM. What a weight loader does to a
tensor under tensor parallelism is written here from its description; no kernel, no communication.
"""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

MODULES = {
    "parameter": "vllm.model_executor.parameter",
    "linear": "vllm.model_executor.layers.linear",
    "quantization": "vllm.model_executor.layers.quantization",
    "base_config": "vllm.model_executor.layers.quantization.base_config",
}


def get_tensor_model_parallel_rank() -> int:
    """Replaced by tests."""
    return 0


def get_tensor_model_parallel_world_size() -> int:
    """Replaced by tests."""
    return 1


def _module(name: str) -> Any:
    return sys.modules[MODULES[name]]


# -- parameters ------------------------------------------------------------------------------------


class BasevLLMParameter(nn.Parameter):
    def __new__(cls, data: Tensor | None, **kwargs: Any) -> Any:
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data: Tensor, weight_loader: Any) -> None:
        self.weight_loader = weight_loader
        self.tp_rank = _module("parameter").get_tensor_model_parallel_rank()
        self.tp_size = _module("parameter").get_tensor_model_parallel_world_size()

    def _fill(self, place: Tensor, loaded_weight: Tensor) -> None:
        assert place.shape == loaded_weight.shape or place.numel() == loaded_weight.numel() == 1
        place.copy_(loaded_weight)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._fill(self.data, loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._fill(self.data, loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._fill(self.data, loaded_weight)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._fill(self.data, loaded_weight)


class _ByOutput(BasevLLMParameter):
    def __init__(self, output_dim: int, **kwargs: Any) -> None:
        self.output_dim = output_dim
        super().__init__(**kwargs)

    def _rows(self, tensor: Tensor, first: int, count: int) -> Tensor:
        return tensor.narrow(self.output_dim, first, count)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        count = self.data.shape[self.output_dim]
        self._fill(self.data, self._rows(loaded_weight, self.tp_rank * count, count))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        count = kwargs["shard_size"]
        place = self._rows(self.data, kwargs["shard_offset"], count)
        self._fill(place, self._rows(loaded_weight, self.tp_rank * count, count))

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        count = kwargs["shard_size"]
        shared = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]  # ranks per KV head
        place = self._rows(self.data, kwargs["shard_offset"], count)
        self._fill(place, self._rows(loaded_weight, self.tp_rank // shared * count, count))


class _ByInput(BasevLLMParameter):
    def __init__(self, input_dim: int, **kwargs: Any) -> None:
        self.input_dim = input_dim
        super().__init__(**kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        count = self.data.shape[self.input_dim]
        self._fill(self.data, loaded_weight.narrow(self.input_dim, self.tp_rank * count, count))


class ModelWeightParameter(_ByOutput, _ByInput):
    pass


class GroupQuantScaleParameter(_ByOutput, _ByInput):
    pass


class ChannelQuantScaleParameter(_ByOutput):
    pass


class PerTensorScaleParameter(BasevLLMParameter):
    def load_merged_column_weight(self, *args: Any, **kwargs: Any) -> None:
        self._one(*args, **kwargs)

    def load_qkv_weight(self, *args: Any, **kwargs: Any) -> None:
        self._one(*args, **kwargs)

    def _one(self, loaded_weight: Tensor, shard_id: str | int, **kwargs: Any) -> None:
        number = {"q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)  # type: ignore[call-overload]
        self._fill(self.data[number], loaded_weight.reshape(()))


# -- quantization ----------------------------------------------------------------------------------

QUANTIZATION_METHODS: list[str] = ["compressed-tensors"]
_REGISTERED: dict[str, Any] = {}


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


def register_quantization_config(quantization: str) -> Any:
    def keep(config: Any) -> Any:
        if quantization not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.append(quantization)
        assert issubclass(config, QuantizationConfig)
        _REGISTERED[quantization] = config
        return config

    return keep


def get_quantization_config(quantization: str) -> Any:
    return _REGISTERED[quantization]


# -- linears ---------------------------------------------------------------------------------------

WEIGHT_LOADER_V2_SUPPORTED: list[str] = []


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition)
        load = extra_weight_attrs["weight_loader"]
        layer.weight = ModelWeightParameter(
            data=data.to(params_dtype), input_dim=1, output_dim=0, weight_loader=load
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    by_input = False

    def _build(self, sizes: list[int], options: dict[str, Any]) -> None:
        linear, quant_config = _module("linear"), options["quant_config"]
        self.tp_rank = linear.get_tensor_model_parallel_rank()
        self.tp_size = linear.get_tensor_model_parallel_world_size()
        self.params_dtype = options["params_dtype"] or torch.get_default_dtype()
        self.skip_bias_add, self.return_bias = options["skip_bias_add"], options["return_bias"]
        self.output_sizes = sizes
        method = quant_config.get_quant_method(self, options["prefix"])
        self.quant_method = method
        assert type(method).__name__ in linear.WEIGHT_LOADER_V2_SUPPORTED
        columns = self.input_size // (self.tp_size if self.by_input else 1)
        ranks = 1 if self.by_input else self.tp_size
        method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=[size // ranks for size in sizes],
            input_size=self.input_size,
            output_size=sum(sizes),
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader_v2,
        )
        if options["bias"]:
            self.bias = nn.Parameter(
                torch.zeros(sum(sizes) // ranks, dtype=self.params_dtype), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)

    def _answer(self, x: Tensor, bias: Tensor | None) -> Any:
        output = self.quant_method.apply(self, x, bias)
        later = self.bias if self.skip_bias_add else None
        return (output, later) if self.return_bias else output

    def forward(self, input_: Tensor) -> Any:
        return self._answer(input_, None if self.skip_bias_add else self.bias)


class ColumnParallelLinear(LinearBase):
    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        param.load_column_parallel_weight(loaded_weight=loaded_weight)


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        options = dict(locals())
        super().__init__()
        self.input_size = input_size
        self._build(output_sizes, options)

    def weight_loader_v2(
        self, param: Any, loaded_weight: Tensor, loaded_shard_id: int | None = None
    ) -> None:
        assert loaded_shard_id is not None
        param.load_merged_column_weight(
            loaded_weight=loaded_weight,
            shard_id=loaded_shard_id,
            shard_offset=sum(self.output_sizes[:loaded_shard_id]) // self.tp_size,
            shard_size=self.output_sizes[loaded_shard_id] // self.tp_size,
        )


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        v_head_size: int | None = None,
    ) -> None:
        options = dict(locals())
        super().__init__()
        self.input_size = hidden_size
        ranks = _module("linear").get_tensor_model_parallel_world_size()
        kv_heads = total_num_kv_heads or total_num_heads
        self.replicas = max(ranks // kv_heads, 1)
        kv = kv_heads * self.replicas * head_size
        self._build([total_num_heads * head_size, kv, kv], options)

    def weight_loader_v2(
        self, param: Any, loaded_weight: Tensor, loaded_shard_id: str | None = None
    ) -> None:
        assert loaded_shard_id is not None
        sizes = [size // self.tp_size for size in self.output_sizes]
        number = "qkv".index(loaded_shard_id)
        param.load_qkv_weight(
            loaded_weight=loaded_weight,
            num_heads=self.replicas,
            shard_id=loaded_shard_id,
            shard_offset=sum(sizes[:number]),
            shard_size=sizes[number],
        )


class RowParallelLinear(LinearBase):
    by_input = True

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: Any = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
    ) -> None:
        options = dict(locals())
        super().__init__()
        self.input_size = input_size
        self._build([output_size], options)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        param.load_row_parallel_weight(loaded_weight=loaded_weight)

    def forward(self, input_: Tensor) -> Any:
        # One rank adds the bias: the ranks' outputs are summed.
        return self._answer(input_, None if self.skip_bias_add or self.tp_rank else self.bias)


_CONTENT = {
    "parameter": (
        BasevLLMParameter,
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        ModelWeightParameter,
        PerTensorScaleParameter,
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    ),
    "linear": (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    ),
    "quantization": (register_quantization_config, get_quantization_config),
    "base_config": (QuantizationConfig,),
}


def modules() -> dict[str, types.ModuleType]:
    """Modules to put into `sys.modules`, parents included, fresh lists in them."""
    found: dict[str, types.ModuleType] = {}
    for short, name in MODULES.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in found:
                found[path] = types.ModuleType(path)
                found[path].__path__ = []  # type: ignore[attr-defined]
                if depth > 1:
                    setattr(found[".".join(parts[: depth - 1])], parts[depth - 1], found[path])
        for item in _CONTENT[short]:
            setattr(found[name], item.__name__, item)
    vars(found[MODULES["linear"]])["WEIGHT_LOADER_V2_SUPPORTED"] = WEIGHT_LOADER_V2_SUPPORTED
    vars(found[MODULES["quantization"]])["QUANTIZATION_METHODS"] = QUANTIZATION_METHODS
    return found
