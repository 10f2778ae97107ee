"""What transformers reads and writes packed checkpoints through.

After `import quantkit`, `AutoModelForCausalLM.from_pretrained` understands
`quant_method: quantkit`, with `device_map`, `generate` and `save_pretrained`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.errors import QuantkitError
from quantkit.pack import scheme as schemes
from quantkit.runtime.convert import replace_linears
from quantkit.runtime.experts import QuantExperts


class QuantkitConfig(QuantizationConfigMixin):
    """The `quantization_config` object of a packed checkpoint, checked when it is read."""

    def __init__(self, **data: Any) -> None:
        self.scheme = schemes.from_json({"quant_method": schemes.METHOD, **data})
        self.quant_method = schemes.METHOD  # type: ignore[assignment]  # theirs is an enum

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, as `pack` wrote it."""
        return self.scheme.to_json()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class QuantkitQuantizer(HfQuantizer):
    """Replaces linears by packed ones before the weights are loaded; nothing is converted."""

    requires_calibration = True
    quantization_config: QuantkitConfig
    _packed_experts = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed: the reference runs everywhere."""

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of what is not packed: bfloat16 unless asked otherwise."""
        self._dtype = dtype or torch.bfloat16
        return self._dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype = getattr(self, "_dtype", torch.bfloat16)
        replace_linears(model, self.quantization_config.scheme, dtype)
        self._packed_experts = any(isinstance(m, QuantExperts) for m in model.modules())
        if self._packed_experts and not hasattr(HfQuantizer, "update_weight_conversions"):
            raise QuantkitError(
                "this transformers would merge a mixture's packed experts while it loads them",
                "pip install --upgrade transformers",
            )
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Experts keep the checkpoint's own names: nothing merges them into fused tensors.

        Earlier versions of transformers do not say which model.
        """
        if not self._packed_experts:
            return weight_conversions
        from transformers.core_model_loading import WeightConverter

        return [c for c in weight_conversions if not isinstance(c, WeightConverter)]

    def is_serializable(self) -> bool:
        """Saving writes the tensors that were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The reference is plain torch."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantkitQuantizer:
        return QuantkitQuantizer(copy.deepcopy(self.quantization_config, memo))


def register() -> None:
    """Make `quant_method: quantkit` known to transformers; again is harmless."""
    if schemes.METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(schemes.METHOD)(QuantkitConfig)
    if schemes.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(schemes.METHOD)(QuantkitQuantizer)


register()
