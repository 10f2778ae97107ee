"""Layouts: what is found, what fits together, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.errors import InputRejected
from quantkit.model.families import FAMILIES, describe
from quantkit.model.sites import READERS, ModelLayout, part_of, read_weight
from tests.model.stand_in import Info, MemoryCheckpoint
from tests.model.test_block import FAMILIES as TINY
from tests.tiny import save_tiny


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MemoryCheckpoint, ModelLayout]:
    path = tmp_path_factory.mktemp("tiny")
    checkpoint = MemoryCheckpoint(save_tiny(path, request.param, **TINY[request.param]))
    return checkpoint, describe(checkpoint.config, checkpoint.tensors)


def test_every_tensor_has_its_place(opened: tuple[MemoryCheckpoint, ModelLayout]) -> None:
    checkpoint, layout = opened
    assert layout.unmatched == ()
    assert layout.tied == ("lm_head.weight" not in checkpoint.weights)
    assert (layout.n_layers, layout.hidden, layout.head_dim) == (2, 64, 16)
    assert (layout.n_heads, layout.n_kv_heads) == (4, 2)
    assert len({s.key for s in layout.sites}) == len(layout.sites)


def test_shapes_and_parts(opened: tuple[MemoryCheckpoint, ModelLayout]) -> None:
    checkpoint, layout = opened
    for site in layout.sites:
        assert (site.norm is not None) == (site.kind in READERS)
        assert (site.writer is not None) == (site.kind not in READERS)
        for linear in site.linears:
            weight = read_weight(checkpoint, linear)
            assert tuple(weight.shape) == linear.shape
            assert linear.shape[1] == site.width
            assert torch.equal(weight, part_of(linear, checkpoint.weights[linear.tensor]))
        if site.writer is not None:
            rows = site.writer_rows()
            assert len(rows) == site.width
            assert int(rows.max()) == site.writer.shape[0] - 1
    for layer in range(2):
        writers = layout.residual_writers(layer)
        assert all(linear.shape[0] == layout.hidden for linear in writers)


def test_writer_rows_follow_the_heads(opened: tuple[MemoryCheckpoint, ModelLayout]) -> None:
    """Zeroing a row of v zeroes exactly the channels of o's input that it writes."""
    from quantkit.model.block import BlockRunner

    checkpoint, layout = opened
    runner = BlockRunner(checkpoint, layout)
    site = layout.by_key["layers.0.attn_out"]
    assert site.writer is not None
    writer = site.writer
    weight = checkpoint.read(writer.tensor)
    first = writer.rows[0] if writer.rows else 0
    weight[first + 17] = 0
    override = {writer.tensor: weight}
    if writer.bias:
        bias = checkpoint.read(writer.bias)
        bias[first + 17] = 0
        override[writer.bias] = bias
    seen = {}
    hidden = torch.randn(1, 8, layout.hidden, generator=torch.Generator().manual_seed(1))
    runner.capture(runner.load(0, override), 0, hidden, lambda s, x: seen.__setitem__(s.key, x))
    silent = (seen[site.key] == 0).all(dim=0)
    assert torch.equal(silent, site.writer_rows() == 17)


def llama_tensors(tmp_path: Path) -> tuple[dict, dict[str, Info]]:
    checkpoint = MemoryCheckpoint(save_tiny(tmp_path, "llama"))
    return checkpoint.config, checkpoint.tensors


def test_unknown_family_names_the_known(tmp_path: Path) -> None:
    config, tensors = llama_tensors(tmp_path)
    for model_type in ("mamba", None, 3, ["llama"]):
        with pytest.raises(InputRejected, match="unknown model family") as caught:
            describe(config | {"model_type": model_type}, tensors)
        assert "qwen3_moe" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_missing_and_misshapen_tensors(name: str, tmp_path: Path) -> None:
    config, tensors = llama_tensors(tmp_path)
    with pytest.raises(InputRejected, match=name.removesuffix(".weight").replace(".", r"\.")):
        describe(config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(InputRejected):
        describe(config, tensors | {name: Info(torch.float32, (3, 5, 7))})
    with pytest.raises(InputRejected):
        describe(config, tensors | {name: Info(torch.float32, (96, 96))})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, -1, 10**12, "4", True, 1.5, 3])
def test_hostile_counts(key: str, value: object, tmp_path: Path) -> None:
    config, tensors = llama_tensors(tmp_path)
    with pytest.raises(InputRejected):
        describe(config | {key: value}, tensors)


def test_strangers_are_counted(tmp_path: Path) -> None:
    config, tensors = llama_tensors(tmp_path)
    layout = describe(config, tensors | {"vision.weight": Info(torch.float32, (2,))})
    assert layout.unmatched == ("vision.weight",)


def test_packed_names_give_the_same_layout(tmp_path: Path) -> None:
    config, tensors = llama_tensors(tmp_path)
    plain = describe(config, tensors)
    packed = dict(tensors)
    for linear in plain.linears():
        out, columns = linear.shape
        del packed[linear.tensor]
        packed[f"{linear.module}.weight_packed"] = Info(torch.uint8, (out, columns // 2))
        packed[f"{linear.module}.weight_scale"] = Info(torch.uint8, (out, columns // 32))
    assert describe(config, packed) == plain
