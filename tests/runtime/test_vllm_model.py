"""vLLM's own model code and weight loader on a CPU, with the plugin's linears.

Needs an importable vLLM and VLLM_TARGET_DEVICE=cpu. Its compiled operators are not needed: norms,
rotary embedding and activation run as its native torch code, attention as torch's.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.checkpoint.step import Target
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from tests.tiny import VOCAB, calibrate_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or os.environ.get("VLLM_TARGET_DEVICE") != "cpu",
        reason="needs vLLM and VLLM_TARGET_DEVICE=cpu",
    ),
    pytest.mark.usefixtures("elsewhere"),
]


def causal(attention: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """One sequence [tokens, heads x size] through torch's attention."""
    q, k, v = (t.view(len(t), -1, attention.head_size).transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
    return y[0].transpose(0, 1).reshape(q.shape[1], -1)


def test_vllms_model_gives_the_logits_of_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model

    from quantkit.runtime.vllm import register

    register()
    source = calibrate_tiny(tmp_path, hidden_size=256, head_dim=64, intermediate_size=512)
    packed = pack(source, PackOptions("osc"), Target(tmp_path / "packed")).output
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(Attention, "forward", causal)
    arguments = EngineArgs(
        model=str(packed), enforce_eager=True, dtype="float32", max_model_len=128
    )
    config = arguments.create_engine_config()
    assert config.model_config.quantization == "quantkit"
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(0))
    with set_current_vllm_config(config):
        meeting = f"file://{tmp_path}/rendezvous"
        init_distributed_environment(1, 0, meeting, 0, "gloo")
        initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config)
        for module in model.modules():
            if hasattr(module, "_forward_method") and hasattr(module, "forward_native"):
                module._forward_method = module.forward_native
        with torch.no_grad(), set_forward_context(None, config):
            hidden = model(ids, torch.arange(len(ids)), None, None)
            found = model.compute_logits(hidden)
    with torch.no_grad():
        wanted = quantkit.load(packed, dtype="float32")(ids[None]).logits[0]
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
