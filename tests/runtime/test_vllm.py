"""The vLLM plugin against vLLM where that can be imported, else against stand-ins."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.kernels import dispatch
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.scheme import SiteFormat
from quantkit.pack.scheme import build as build_scheme
from tests.runtime import vllm_stand_in
from tests.tiny import calibrate_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
REAL = importlib.util.find_spec("vllm") is not None
SIGNATURES = json.loads((Path(__file__).parent / "vllm_signatures.json").read_text())
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The plugin's module, imported with vLLM or, without one, with the stand-in."""
    added = {} if REAL else vllm_stand_in.modules()
    sys.modules.update(added)
    try:
        module = importlib.import_module("quantkit.runtime.vllm")
        module.register()
        yield module
    finally:
        for name in (*added, "quantkit.runtime.vllm"):
            sys.modules.pop(name, None)


@pytest.fixture
def parallel(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let layers that are built from now on believe they are `rank` of `size`."""

    def become(rank: int, size: int) -> None:
        for name in ("linear", "parameter"):
            module = sys.modules[vllm_stand_in.MODULES[name]]
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    become(0, 1)
    return become


OPTIONS = {
    "osc": PackOptions("osc"),
    "osc4": PackOptions("osc", mlp_out="mxfp4", group=64),
    "fp8": PackOptions("nvfp4", sites=dict.fromkeys(("attn_in", "mlp_out"), "nvfp4+fp8")),
    "hadamard": PackOptions("osc", mlp_out="mxfp4", hadamard=32),
    "rule": PackOptions("osc", scale_rule="rceil"),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough to be cut in four: hidden 128, intermediate 256, 8 heads, 2 KV heads, biases."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        changes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
        return calibrate_tiny(folder, "qwen2", **changes)


def build(plugin: Any, packed: Checkpoint, layer: int, dtype: torch.dtype) -> dict[str, Any]:
    """The four linears of a decoder block as vLLM's models make them, loaded and processed."""
    vllm = sys.modules[vllm_stand_in.MODULES["linear"]]
    config = plugin.QuantkitConfig.from_config(packed.config["quantization_config"])
    block = f"model.layers.{layer}"
    common = {"params_dtype": dtype, "quant_config": config}
    made = {
        "qkv": vllm.QKVParallelLinear(
            128, 16, 8, 2, bias=True, prefix=f"{block}.self_attn.qkv_proj", **common
        ),
        "o": vllm.RowParallelLinear(
            128, 128, bias=False, reduce_results=False, prefix=f"{block}.self_attn.o_proj", **common
        ),
        "gate_up": vllm.MergedColumnParallelLinear(
            128, [256, 256], bias=False, prefix=f"{block}.mlp.gate_up_proj", **common
        ),
        "down": vllm.RowParallelLinear(
            256, 128, bias=False, reduce_results=False, prefix=f"{block}.mlp.down_proj", **common
        ),
    }
    places = {
        **{f"{block}.self_attn.{s}_proj": ("qkv", s) for s in "qkv"},
        f"{block}.self_attn.o_proj": ("o", None),
        f"{block}.mlp.gate_proj": ("gate_up", 0),
        f"{block}.mlp.up_proj": ("gate_up", 1),
        f"{block}.mlp.down_proj": ("down", None),
    }
    loaded = set()
    for name in packed.names():
        module, _, leaf = name.rpartition(".")
        if module not in places or leaf == "bias":
            continue
        which, shard = places[module]
        parameter = dict(made[which].named_parameters())[leaf]
        arguments = () if shard is None else (shard,)
        parameter.weight_loader(parameter, packed.read(name), *arguments)
        loaded.add((which, leaf))
    expected = {(w, n) for w, m in made.items() for n, _ in m.named_parameters() if n != "bias"}
    assert loaded == expected, "every parameter was loaded, and nothing without a place"
    _load_biases(packed, block, made["qkv"], dtype)
    for module in made.values():
        module.quant_method.process_weights_after_loading(module)
    return made


def _load_biases(packed: Checkpoint, block: str, qkv: Any, dtype: torch.dtype) -> None:
    parts = []
    for shard, total in zip("qkv", qkv.output_sizes, strict=True):
        whole, size = packed.read(f"{block}.self_attn.{shard}_proj.bias"), total // qkv.tp_size
        at = qkv.tp_rank * len(whole) // qkv.tp_size // size  # KV heads may be on several ranks
        parts.append(whole[at * size : (at + 1) * size])
    qkv.bias.data.copy_(torch.cat(parts).to(dtype))


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    widths = {"qkv": 128, "o": 128, "gate_up": 128, "down": 256}
    return {k: torch.randn(9, w, generator=generator).to(dtype) for k, w in widths.items()}


def expected(model: Any, layer: int, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same linears in the model that `quantkit.load` makes."""
    block = model.model.layers[layer]
    attention, mlp = block.self_attn, block.mlp
    with torch.no_grad():
        return {
            "qkv": torch.cat([getattr(attention, f"{s}_proj")(x["qkv"]) for s in "qkv"], -1),
            "o": attention.o_proj(x["o"]),
            "gate_up": torch.cat([mlp.gate_proj(x["gate_up"]), mlp.up_proj(x["gate_up"])], -1),
            "down": mlp.down_proj(x["down"]),
        }


RESIDUAL = PackOptions("nvfp4", branch="residual", branch_bits=0.6)


@pytest.mark.parametrize("name", [*OPTIONS, "residual"])
def test_one_rank_computes_what_quantkit_load_does(
    wide: Path, tmp_path: Path, plugin: Any, parallel: Any, name: str
) -> None:
    packed = pack(wide, OPTIONS.get(name, RESIDUAL), Target(tmp_path / "packed")).output
    for dtype in (torch.bfloat16, torch.float32):
        model, x = quantkit.load(packed, dtype=dtype), inputs(dtype)
        for layer in (0, 1):
            made = build(plugin, open_checkpoint(packed), layer, dtype)
            for which, wanted in expected(model, layer, x).items():
                found, later = made[which](x[which])
                assert later is None
                # One GEMM for the fused linears may sum in another order.
                torch.testing.assert_close(
                    found, wanted, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5
                )
            assert not [n for n, _ in made["o"].named_parameters()], "the file's tensors are freed"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_together_compute_the_whole(
    wide: Path, tmp_path: Path, plugin: Any, parallel: Any, name: str, ranks: int
) -> None:
    packed = pack(wide, OPTIONS[name], Target(tmp_path / "packed")).output
    dtype = torch.float32
    model, x = quantkit.load(packed, dtype=dtype), inputs(dtype)
    wanted = expected(model, 1, x)
    parts = []
    for rank in range(ranks):
        parallel(rank, ranks)
        parts.append(build(plugin, open_checkpoint(packed), 1, dtype))

    def run(which: str, rank: int) -> Tensor:
        module = parts[rank][which]
        slices = x[which].chunk(ranks, -1) if which in ("o", "down") else [x[which]] * ranks
        return module(slices[rank])[0]

    close = {"rtol": 1e-4, "atol": 1e-4}
    for which in ("o", "down"):
        found = sum(run(which, rank) for rank in range(ranks))
        assert isinstance(found, Tensor)
        # A slice's FP8 branch has a scale of its own, of the channels in that slice.
        limit = 1e-2 if name == "fp8" else 1e-5
        assert (found - wanted[which]).norm() <= limit * wanted[which].norm()
    q, k, v = wanted["qkv"].split([128, 32, 32], -1)
    gate, up = wanted["gate_up"].chunk(2, -1)
    for rank in range(ranks):
        kv = [part.split(16, -1)[rank * 2 // ranks] for part in (k, v)]
        mine = torch.cat([q.chunk(ranks, -1)[rank], *kv], -1)
        torch.testing.assert_close(run("qkv", rank), mine, **close)
        mine = torch.cat([gate.chunk(ranks, -1)[rank], up.chunk(ranks, -1)[rank]], -1)
        torch.testing.assert_close(run("gate_up", rank), mine, **close)
    shapes = {tuple(p["o"].quantkit.weight.shape) for p in parts}
    assert len(shapes) == 1, "all ranks run the same shapes"


def test_slices_of_a_residual_branch_are_refused(
    wide: Path, tmp_path: Path, plugin: Any, parallel: Any
) -> None:
    packed = pack(wide, RESIDUAL, Target(tmp_path / "packed")).output
    parallel(0, 2)
    with pytest.raises(UsageError, match="attn_out: a residual branch does not cut into 2 slices"):
        build(plugin, open_checkpoint(packed), 0, torch.float32)


def test_the_reference_is_announced(
    wide: Path, tmp_path: Path, plugin: Any, parallel: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack(wide, PackOptions("osc"), Target(tmp_path / "packed")).output
    dispatch.forget()
    capsys.readouterr()
    build(plugin, open_checkpoint(packed), 0, torch.bfloat16)
    said = capsys.readouterr().err
    assert said.count("packed linears run on the torch reference") == 1
    assert set(dispatch.report()) == {f"layers.0.{k}" for k in KINDS}
    assert {site["kernel"] for site in dispatch.report().values()} == {"reference"}


KINDS = ("attn_in", "attn_out", "mlp_in", "mlp_out")


def test_sites_that_are_not_packed_stay_ordinary(
    wide: Path, tmp_path: Path, plugin: Any, parallel: Any
) -> None:
    options = PackOptions("osc", sites={"mlp_in": "bf16"})
    packed = open_checkpoint(pack(wide, options, Target(tmp_path / "packed")).output)
    config = plugin.QuantkitConfig.from_config(packed.config["quantization_config"])
    vllm = sys.modules[vllm_stand_in.MODULES["linear"]]
    layer = nn.Module()
    layer.__class__ = type("Linear", (vllm.LinearBase,), {})
    methods = {
        prefix: type(config.get_quant_method(layer, prefix)).__name__
        for prefix in (
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.1.mlp.down_proj",
            "model.layers.1.mlp.gate",
            "lm_head",
        )
    }
    assert list(methods.values()) == [
        "UnquantizedLinearMethod",
        "QuantkitLinearMethod",
        "QuantkitLinearMethod",
        "UnquantizedLinearMethod",
        "UnquantizedLinearMethod",
    ]
    assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
    with pytest.raises(UsageError, match="mixtures"):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.experts")


def test_a_packed_head_or_embedding_is_refused(plugin: Any) -> None:
    eight = SiteFormat("mxfp8", "mxfp8")
    section = build_scheme("osc").with_ends(eight, None).to_json()
    with pytest.raises(UsageError, match="not served by vLLM yet"):
        plugin.QuantkitConfig.from_config(section)


def test_registering_again_is_harmless(plugin: Any) -> None:
    quantization = sys.modules[vllm_stand_in.MODULES["quantization"]]
    linear = sys.modules[vllm_stand_in.MODULES["linear"]]
    for _ in range(2):
        plugin.register()
    assert quantization.QUANTIZATION_METHODS.count("quantkit") == 1
    assert linear.WEIGHT_LOADER_V2_SUPPORTED.count("QuantkitLinearMethod") == 1
    assert quantization.get_quantization_config("quantkit") is plugin.QuantkitConfig
    assert plugin.QuantkitConfig.get_name() == "quantkit"
    with pytest.raises(InputRejected):
        plugin.QuantkitConfig.from_config({"quant_method": "quantkit", "format_version": 99})


def test_the_entry_point_names_the_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    assert points == {"quantkit": "quantkit.runtime.vllm:register"}


def _signatures(find: Callable[[str], Any]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for short, items in SIGNATURES["signatures"].items():
        module = find(vllm_stand_in.MODULES[short])
        found[short] = {}
        for path in items:
            item: Any = module
            for part in path.split("."):
                item = getattr(item, part)
            found[short][path] = list(inspect.signature(item).parameters)
    return found


def test_the_stand_ins_have_the_published_signatures() -> None:
    modules = vllm_stand_in.modules()
    assert _signatures(modules.__getitem__) == SIGNATURES["signatures"]


@pytest.mark.skipif(not REAL, reason="vLLM is not installed")
def test_the_published_signatures_are_those_of_vllm() -> None:
    assert _signatures(importlib.import_module) == SIGNATURES["signatures"]
