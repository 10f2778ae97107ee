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

from quantkit.model.families import FAMILIES
from quantkit.pack import scheme as schemes
from quantkit.runtime import decode
from quantkit.runtime.convert import EXPERTS, replace_linears
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
    _hidden_type: tuple[Any, str] | None = None

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
            # transformers 5.0 looks conversions up by the model type, merging those of experts;
            # `get_weight_conversions`, which it calls next, gives the type back.
            self._hidden_type = model.config, model.config.model_type
            model.config.model_type = ""
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        decode.install(model)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """None of our own; in transformers 5.0 those of the model, merging left out."""
        if self._hidden_type is None:
            return super().get_weight_conversions()
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        (config, model_type), self._hidden_type = self._hidden_type, None
        config.model_type = model_type
        found = _renamings(get_checkpoint_conversion_mapping(model_type) or [])
        experts = FAMILIES[model_type].experts
        if experts is not None and experts.module != EXPERTS:  # there the merging renames too
            found.append(WeightRenaming(f".{experts.module}.", f".{EXPERTS}."))
        return found

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Experts keep the checkpoint's own names: nothing merges them into fused tensors.

        Earlier versions of transformers do not say which model.
        """
        return _renamings(weight_conversions) if self._packed_experts else weight_conversions

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


def _renamings(conversions: list[Any]) -> list[Any]:
    from transformers.core_model_loading import WeightConverter

    return [c for c in conversions if not isinstance(c, WeightConverter)]


def register() -> None:
    """Make `quant_method: quantkit` known to transformers; again is harmless."""
    if schemes.METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(schemes.METHOD)(QuantkitConfig)
    if schemes.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(schemes.METHOD)(QuantkitQuantizer)


register()
