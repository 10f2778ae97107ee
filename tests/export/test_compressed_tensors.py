"""Packed checkpoints read by the compressed-tensors library and stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected
from quantkit.export.compressed_tensors import can_describe, read_config, write_config
from quantkit.kernels.reference import dequantized_weight
from quantkit.model.families import describe
from quantkit.pack.job import PackOptions
from quantkit.pack.layout import tensors_of
from quantkit.pack.pack import pack
from quantkit.pack.scheme import Scheme, SiteFormat, build
from quantkit.runtime.load import scheme_of
from tests.tiny import VOCAB, save_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
pytest.importorskip("compressed_tensors")

SCHEMES = {
    "mxfp4": PackOptions("mxfp4"),
    "nvfp4": PackOptions("nvfp4"),
    "mxfp8": PackOptions("mxfp8"),
    "mixed": PackOptions("mxfp4", sites={"mlp_out": "mxfp8", "attn_out": "nvfp4"}),
    "some": PackOptions("mxfp4", sites={"mlp_in": "bf16"}),
    "head": PackOptions("mxfp8", head="mxfp8"),
    "ends": PackOptions("mxfp4", head="mxfp8", embedding="mxfp8"),
    "other ends": PackOptions("nvfp4", sites={"mlp_in": "bf16"}, head="mxfp4", embedding="mxfp8"),
}
COUNTS = {"some": 10, "head": 15, "ends": 16, "other ends": 12}


def linears(packed: Checkpoint) -> dict[str, tuple[SiteFormat, dict[str, Tensor]]]:
    """Every packed linear: its format and its tensors."""
    scheme, layout = scheme_of(packed), describe(packed.config, packed.tensors)
    assert scheme is not None
    found = {}
    for site in layout.sites:
        fmt = scheme.site(site.key, site.kind)
        for linear in site.linears if fmt else ():
            assert fmt is not None
            names = tensors_of(fmt, *linear.shape)
            tensors = {name: packed.read(f"{linear.module}.{name}") for name in names}
            found[linear.module] = fmt, tensors
    for linear, fmt in scheme.ends(layout):
        names = tensors_of(fmt, *linear.shape)
        tensors = {name: packed.read(f"{linear.module}.{name}") for name in names}
        found[linear.module] = fmt, tensors
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_decompresses_to_our_weights(
    calibrated: Path, tmp_path: Path, name: str
) -> None:
    packed = open_checkpoint(pack(calibrated, SCHEMES[name], Target(tmp_path / "out")).output)
    assert len(assert_the_library_agrees(packed)) == COUNTS.get(name, 14)


def assert_the_library_agrees(packed: Checkpoint) -> set[str]:
    """It understands the configuration, means the same linears, and decompresses to our bits."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules

    section = dict(packed.config["quantization_config"])
    config = QuantizationConfig(**section)
    known = {*QuantizationConfig.model_fields, "transform_config"}  # the latter has its own model
    assert set(section) <= known
    ours = linears(packed)
    model = skeleton(packed)
    seen = set()
    for group in config.config_groups.values():
        for module, _ in match_named_modules(model, group.targets, config.ignore):
            fmt, tensors = ours[module]
            compressor = BaseCompressor.get_value_from_registry(group.format)
            weight = compressor.decompress(dict(tensors), group)["weight"]
            expected = dequantized_weight(tensors, fmt, torch.bfloat16)
            assert torch.equal(weight.view(torch.int16), expected.view(torch.int16)), module
            assert module not in seen
            seen.add(module)
    assert seen == set(ours)
    return seen


def skeleton(packed: Checkpoint) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **{k: v for k, v in packed.config.items() if k != "quantization_config"}
    )
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", SCHEMES)
def test_stock_transformers_gives_the_reference_logits(
    calibrated: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    packed = pack(calibrated, SCHEMES[name], Target(tmp_path / "out")).output
    stock = AutoModelForCausalLM.from_pretrained(packed).eval()
    assert stock.config.quantization_config.quant_method == "compressed-tensors"
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = stock(ids).logits, quantkit.load(packed)(ids).logits
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("name", SCHEMES)
def test_our_reader_understands_our_writer(calibrated: Path, tmp_path: Path, name: str) -> None:
    result = pack(calibrated, SCHEMES[name], Target(tmp_path / "out"))
    read = scheme_of(open_checkpoint(result.output))
    assert result.quant_method == "compressed-tensors"
    assert read is not None
    words = {k: f.words() if f else None for k, f in read.sites.items()}
    assert words == {k: f.words() if f else None for k, f in result.scheme.sites.items()}
    assert not read.overrides
    assert (read.head, read.embedding) == (result.scheme.head, result.scheme.embedding)


def test_the_scale_rule_travels_with_the_file(calibrated: Path, tmp_path: Path) -> None:
    result = pack(calibrated, PackOptions("mxfp4", scale_rule="floor"), Target(tmp_path / "out"))
    read = scheme_of(open_checkpoint(result.output))
    assert read is not None
    assert read.scale_rule == "floor"


def test_single_sites_are_named_module_by_module(calibrated: Path) -> None:
    source = open_checkpoint(calibrated)
    layout = describe(source.config, source.tensors)
    scheme = build("mxfp4")
    eight = SiteFormat("mxfp8", "mxfp8")
    scheme = Scheme("plan", scheme.sites, "even", {"layers.1.mlp_out": eight})
    section = write_config(scheme, layout)
    assert section["format"] == "mixed-precision"
    targets = [group["targets"] for group in section["config_groups"].values()]
    assert ["model.layers.1.mlp.down_proj"] in targets
    read = read_config(section, layout)
    assert read.overrides == {"layers.1.mlp_out": eight}
    left = Scheme("plan", scheme.sites, "even", {"layers.1.mlp_out": None})
    section = write_config(left, layout)
    assert "model.layers.1.mlp.down_proj" in section["ignore"]
    assert read_config(section, layout).overrides == {"layers.1.mlp_out": None}


def test_routers_are_ignored(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    packed = open_checkpoint(pack(source, PackOptions("mxfp4"), Target(tmp_path / "out")).output)
    assert r"re:.*\.gate$" in packed.config["quantization_config"]["ignore"]


def test_what_it_has_no_word_for() -> None:
    assert can_describe(build("mxfp4"))
    assert not can_describe(build("osc"))
    rotated = SiteFormat("mxfp4", "mxfp4", hadamard={"block": 32})
    assert not can_describe(Scheme("mxfp4", dict.fromkeys(build("mxfp4").sites, rotated)))
    packed = build("mxfp4").with_ends(SiteFormat("mxfp8", "mxfp8"), SiteFormat("mxfp8", "none"))
    assert can_describe(packed)
    assert not can_describe(packed, tied=True)
    four = build("mxfp4").with_ends(None, SiteFormat("mxfp4", "none"))
    assert not can_describe(four), "transformers cannot load it"


def test_an_embedding_is_no_linear(calibrated: Path) -> None:
    """Foreign configurations: what `Linear`, `Embedding` and `ignore` mean outside the blocks."""
    source = open_checkpoint(calibrated)
    layout = describe(source.config, source.tensors)
    section = write_config(build("mxfp4"), layout)
    read = read_config(section | {"ignore": []}, layout)
    assert (read.head, read.embedding) == (SiteFormat("mxfp4", "mxfp4"), None)
    weights_only = section["config_groups"]["group_0"] | {"input_activations": None}
    groups = section["config_groups"] | {"table": weights_only | {"targets": ["Embedding"]}}
    read = read_config(section | {"config_groups": groups}, layout)
    assert (read.head, read.embedding) == (None, SiteFormat("mxfp4", "none"))
    ignored = {"config_groups": groups, "ignore": ["lm_head", "model.embed_tokens"]}
    assert read_config(section | ignored, layout).embedding is None
    tied = describe(
        source.config | {"tie_word_embeddings": True},
        {name: info for name, info in source.tensors.items() if name != "lm_head.weight"},
    )
    assert read_config(section | {"ignore": []}, tied).head is None


@pytest.mark.parametrize(
    "change",
    [
        {"config_groups": {}},
        {"config_groups": {"group_0": {"targets": "Linear"}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
        {"ignore": "lm_head"},
        {"ignore": ["re:("]},
        {"quant_method": "gptq"},
    ],
)
def test_hostile_configurations_are_rejected(calibrated: Path, change: dict[str, Any]) -> None:
    source = open_checkpoint(calibrated)
    layout = describe(source.config, source.tensors)
    section = write_config(build("mxfp4"), layout)
    with pytest.raises(InputRejected):
        read_config(section | change, layout)
