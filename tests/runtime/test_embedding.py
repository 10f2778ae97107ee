"""Packed embedding and head at run time: logits, rows, tied models, saving, moving."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected
from quantkit.formats import mxfp8
from quantkit.kernels import dispatch, reference
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.embedding import QuantEmbedding, TiedHead
from quantkit.runtime.linear import QuantLinear
from tests.tiny import VOCAB, save_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
PLAIN = {"mlp_out": "mxfp8"}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "qwen3_moe": ("qwen3_moe", {}),
}


def ids(count: int = 24) -> Tensor:
    return torch.randint(3, VOCAB, (2, count), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=ids()).logits


def packed_pair(folder: Path, name: str, fmt: str = "mxfp8") -> tuple[Path, Path]:
    """A model packed as it is and with both ends packed too."""
    family, changes = FAMILIES[name]
    source = save_tiny(folder / "model", family, torch.bfloat16, **changes)
    plain = PackOptions("mxfp4", sites=PLAIN, scale_rule="even4")
    both = replace(plain, head=fmt, embedding=fmt)
    return (
        pack(source, plain, Target(folder / "plain")).output,
        pack(source, both, Target(folder / "packed")).output,
    )


def whole_table(path: Path, module: str, fmt: SiteFormat, dtype: torch.dtype) -> Tensor:
    checkpoint = open_checkpoint(path)
    names = (n for n in checkpoint.names() if n.startswith(f"{module}."))
    tensors = {name.rpartition(".")[2]: checkpoint.read(name) for name in names}
    return reference.dequantized_weight(tensors, fmt, dtype)


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_files_arithmetic(tmp_path: Path, name: str, fmt: str) -> None:
    """Beside a model with the decoded table in an ordinary embedding, the head by float64."""
    tied = FAMILIES[name][1].get("tie_word_embeddings", False)
    plain, both = packed_pair(tmp_path, name, fmt)
    model, other = (quantkit.load(path, dtype=torch.float32) for path in (both, plain))
    table = whole_table(both, "model.embed_tokens", SiteFormat(fmt, "none"), torch.float32)
    weight = table
    if not tied:
        weight = whole_table(both, "lm_head", SiteFormat(fmt, fmt), torch.float32)
    assert type(model.lm_head) is (TiedHead if tied else QuantLinear)
    rule = model.lm_head.site.rule

    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            operand = reference.quantize_activations(x, fmt, rule, None)
            return (operand.double() @ weight.double().T).float()

    other.lm_head = Head()
    other.model.embed_tokens.weight = nn.Parameter(table, requires_grad=False)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    for_rows = model.model.embed_tokens(ids())
    assert torch.equal(for_rows, other.model.embed_tokens(ids()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_rows_are_those_of_the_whole_table(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 64, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    packed = QuantEmbedding(50, 64, SiteFormat("mxfp8", "none"), dtype=dtype)
    codes, scale = mxfp8.quantize(weight)
    packed.weight.copy_(codes)
    packed.weight_scale.copy_(scale)
    whole = mxfp8.dequantize(codes, scale, dtype)
    for shape in ((1,), (2, 7), (3, 0), ()):
        wanted = torch.randint(0, 50, shape, generator=generator)
        found = packed(wanted)
        assert found.dtype == dtype
        assert torch.equal(found, whole[wanted])
        assert torch.equal(packed(wanted.int()), found)


def test_only_the_rows_that_are_asked_for_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, both = packed_pair(tmp_path, "llama")
    table = quantkit.load(both).model.embed_tokens
    decode, seen = reference.dequantized_weight, []

    def watched(tensors: Any, *arguments: Any) -> Tensor:
        seen.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return decode(tensors, *arguments)

    monkeypatch.setattr(reference, "dequantized_weight", watched)
    table(ids(5))
    assert seen == [{"weight": (2, 5, 64), "weight_scale": (2, 5, 2)}]


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "qwen3_moe"])
def test_from_pretrained_generate_and_save(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    _, both = packed_pair(tmp_path, name)
    if name == "qwen3_moe":  # stock transformers rounds no inputs of experts
        both = pack(
            tmp_path / "model",
            PackOptions("mxfp4", sites=PLAIN, hadamard=32, head="mxfp8", embedding="mxfp8"),
            Target(tmp_path / "rotated"),
        ).output
    ours = quantkit.load(both)
    theirs = AutoModelForCausalLM.from_pretrained(both, device_map="auto").eval()
    assert theirs.config.quantization_config.quant_method == "quantkit"
    assert torch.equal(logits(ours), logits(theirs))
    made = theirs.generate(ids(8), max_new_tokens=6, do_sample=False)
    assert torch.equal(made, ours.generate(ids(8), max_new_tokens=6, do_sample=False))
    theirs.save_pretrained(tmp_path / "saved")
    before, after = open_checkpoint(both), open_checkpoint(tmp_path / "saved")
    assert set(before.names()) == set(after.names())
    for key in before.names():
        assert torch.equal(*(c.read(key).view(torch.uint8) for c in (before, after))), key
    assert after.config["quantization_config"] == before.config["quantization_config"]
    assert after.config["tie_word_embeddings"] == before.config["tie_word_embeddings"]
    assert torch.equal(logits(quantkit.load(tmp_path / "saved")), logits(ours))


def test_casting_and_copying_keep_the_packed_numbers(tmp_path: Path) -> None:
    _, both = packed_pair(tmp_path, "gemma3")
    model = quantkit.load(both)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert twin.lm_head.packed()["weight"] is twin.model.embed_tokens.weight
    cast = nn.Module.float(twin)
    assert cast.model.embed_tokens.weight.dtype == torch.float8_e4m3fn
    assert cast.model.embed_tokens(ids()).dtype == torch.float32
    assert torch.equal(logits(cast), logits(quantkit.load(both, dtype=torch.float32)))


def test_the_head_goes_through_dispatch_and_a_tied_table_stays_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.forget()
    _, both = packed_pair(tmp_path, "llama-tied")
    model = quantkit.load(both)
    expected = logits(model)
    assert dispatch.report()["lm_head"] == {
        "formats": "mxfp8 x mxfp8",
        "branch": "none",
        "kernel": "reference",
        "reason": "no CUDA device",
    }
    table = model.model.embed_tokens.weight
    work_seen: list[dispatch.Work] = []

    class Kernel(nn.Module):
        def __init__(self, work: dispatch.Work, tensors: Any) -> None:
            super().__init__()
            fmt = SiteFormat(work.weights, work.activations)
            self.run = lambda x: reference.packed_linear(x, tensors, fmt, work.rule)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    def prepare(site: str, work: Any, linears: Any, device: Any) -> nn.Module | None:
        if site != "lm_head":
            return None
        work_seen.append(work)
        return Kernel(work, linears[0])

    monkeypatch.setattr(dispatch, "prepare", prepare)
    model.lm_head.site.forget()
    assert torch.equal(logits(model), expected)
    assert (work_seen[0].width, work_seen[0].outputs) == (64, (VOCAB,))
    assert model.model.embed_tokens.weight is table
    assert not list(model.lm_head.buffers())


def test_a_tied_model_with_one_of_them_packed_is_rejected(tmp_path: Path) -> None:
    import json

    _, both = packed_pair(tmp_path, "llama-tied")
    config = json.loads((both / "config.json").read_text())
    del config["quantization_config"]["head"]
    (both / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRejected, match="tied head"):
        quantkit.load(both)


def test_compiled_lookups_are_the_same(tmp_path: Path) -> None:
    _, both = packed_pair(tmp_path, "gemma")
    table = quantkit.load(both).model.embed_tokens
    compiled = torch.compile(table, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids()), table(ids()))
