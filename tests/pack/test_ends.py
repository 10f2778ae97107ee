"""Embedding and head packed: bytes, tied models, memory, refusals, what `config.json` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.inspect import as_text, inspect
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from quantkit.formats import mxfp4, mxfp8
from quantkit.pack import ends
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack
from quantkit.pack.preview import preview
from quantkit.pack.scheme import SiteFormat, build, from_json
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")
TABLE, HEAD = "model.embed_tokens", "lm_head"
BOTH = PackOptions("osc", head="mxfp8", embedding="mxfp8")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "model"
    return save_tiny(folder, "llama", torch.bfloat16, tie_word_embeddings=True)


def test_bytes_are_those_of_rounding_to_nearest(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "PIECE", 64 * 100)  # pieces of 100 rows, the last one of 56
    options = PackOptions("osc", head="mxfp8", embedding="mxfp4", scale_rule="rceil")
    packed = open_checkpoint(pack(calibrated, options, Target(tmp_path / "out")).output)
    plain = pack(calibrated, PackOptions("osc", scale_rule="rceil"), Target(tmp_path / "plain"))
    source, others = open_checkpoint(calibrated), open_checkpoint(plain.output)
    codes, scale = mxfp8.quantize(source.read(f"{HEAD}.weight"), "rceil")
    assert torch.equal(packed.read(f"{HEAD}.weight").view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(packed.read(f"{HEAD}.weight_scale"), scale)
    codes, scale = mxfp4.quantize(source.read(f"{TABLE}.weight"), "rceil")
    assert torch.equal(packed.read(f"{TABLE}.weight_packed"), codes)
    assert torch.equal(packed.read(f"{TABLE}.weight_scale"), scale)
    assert f"{TABLE}.weight" not in packed.tensors
    for name in others.names():
        if not name.startswith((TABLE, HEAD)):
            a, b = packed.read(name), others.read(name)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    section, before = packed.config["quantization_config"], others.config["quantization_config"]
    assert packed.config["tie_word_embeddings"] is False
    assert (section["format_version"], before["format_version"]) == (2, 1)
    assert (section["ignore"], before["ignore"]) == ([], ["lm_head"])
    assert from_json(section).head == SiteFormat("mxfp8", "mxfp8")
    assert from_json(section).embedding == SiteFormat("mxfp4", "none")
    assert not {"head", "embedding"} & set(before)


def test_the_matrices_are_never_read_whole(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "PIECE", 64 * 16)
    read, read_rows, seen = Checkpoint.read, Checkpoint.read_rows, []

    def whole(self: Checkpoint, name: str, out: Any = None) -> Any:
        assert not name.startswith((TABLE, HEAD)), name
        return read(self, name, out)

    def part(self: Checkpoint, name: str, rows: Any) -> Any:
        found = read_rows(self, name, rows)
        if name.startswith((TABLE, HEAD)):
            seen.append(len(found))
        return found

    monkeypatch.setattr(Checkpoint, "read", whole)
    monkeypatch.setattr(Checkpoint, "read_rows", part)
    pack(calibrated, BOTH, Target(tmp_path / "out"))
    assert seen == [16] * 32


@pytest.mark.parametrize("scheme", ["mxfp4", "osc"])
def test_a_tied_matrix_is_stored_once(
    tied: Path, calibrated: Path, tmp_path: Path, scheme: str
) -> None:
    sites = dict.fromkeys(("attn_in", "attn_out", "mlp_in"), "mxfp4")  # needs no statistics
    options = PackOptions(scheme, head="mxfp8", embedding="mxfp8", sites=sites)
    result = pack(tied, options, Target(tmp_path / "out"))
    packed = open_checkpoint(result.output)
    assert packed.tensors[f"{TABLE}.weight"].dtype == torch.float8_e4m3fn
    assert not any(name.startswith(HEAD) for name in packed.names())
    assert packed.config["tie_word_embeddings"] is True
    assert result.quant_method == "quantkit", "nobody else reads one matrix as both"
    assert result.outside == {"embedding": 8.25}


@pytest.mark.parametrize(
    ("head", "embedding"), [("mxfp8", None), (None, "mxfp8"), ("mxfp8", "mxfp4")]
)
def test_a_tied_matrix_is_not_packed_for_one_of_them(
    tied: Path, tmp_path: Path, head: str | None, embedding: str | None
) -> None:
    options = PackOptions("mxfp4", head=head, embedding=embedding)
    with pytest.raises(UsageError, match="packed together or not at all") as error:
        pack(tied, options, Target(tmp_path / "out"))
    assert error.value.hint == "--head mxfp8 --embedding mxfp8"
    assert not list(tmp_path.iterdir())


def test_a_head_of_its_own_may_be_packed_alone(calibrated: Path, tmp_path: Path) -> None:
    result = pack(calibrated, PackOptions("mxfp4", head="mxfp4"), Target(tmp_path / "out"))
    packed = open_checkpoint(result.output)
    assert packed.tensors[f"{TABLE}.weight"].dtype == torch.bfloat16
    assert result.outside == {"embedding": 16.0, "head": 4.25}


def test_gptq_leaves_them_rounded_to_nearest(calibrated: Path, tmp_path: Path) -> None:
    options = PackOptions("mxfp4", rounding="gptq", head="mxfp8", embedding="mxfp8")
    nearest = pack(calibrated, BOTH, Target(tmp_path / "nearest"))
    packed = pack(calibrated, options, Target(tmp_path / "gptq"))
    a, b = (open_checkpoint(r.output) for r in (nearest, packed))
    for name in (f"{TABLE}.weight", f"{HEAD}.weight", f"{HEAD}.weight_scale"):
        assert torch.equal(a.read(name).view(torch.uint8), b.read(name).view(torch.uint8))


def test_refusals(calibrated: Path, tmp_path: Path) -> None:
    target = Target(tmp_path / "out")
    with pytest.raises(UsageError, match="--head nvfp4: one of mxfp8, mxfp4"):
        pack(calibrated, PackOptions("mxfp4", head="nvfp4"), target)
    with pytest.raises(UsageError, match="--dtype rounds nothing: leave out --embedding"):
        pack(calibrated, PackOptions("mxfp4", dtype="float32", embedding="mxfp8"), target)
    odd = save_tiny(tmp_path / "odd", hidden_size=80)
    formats = dict.fromkeys(("attn_in", "mlp_in"), "bf16")
    with pytest.raises(InputRejected, match="--head: 80 channels do not divide") as error:
        pack(odd, PackOptions("mxfp4", sites=formats, head="mxfp8"), target)
    assert error.value.hint == "leave out --head"
    broken = save_tiny(tmp_path / "broken", dtype=torch.bfloat16)
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{HEAD}.weight"][200, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRejected, match=r"lm_head.weight holds NaN"):
        pack(broken, PackOptions("mxfp4", head="mxfp8"), target)
    assert not (tmp_path / "out.partial").exists()


def test_the_dry_run_counts_them(calibrated: Path, tmp_path: Path) -> None:
    data, text = preview(calibrated, BOTH, Target(tmp_path / "out"))
    packed = open_checkpoint(pack(calibrated, BOTH, Target(tmp_path / "out")).output)
    assert data["bytes_out"] == sum(info.nbytes for info in packed.tensors.values())
    assert data["bytes_in"] == sum(i.nbytes for i in open_checkpoint(calibrated).tensors.values())
    assert [(r["kind"], r["bits"]) for r in data["outside_blocks"]] == [
        ("embedding", 8.25),
        ("head", 8.25),
    ]
    assert data["left_as_they_are"] == 5
    assert "embedding" in text


def test_inspect_shows_them(calibrated: Path, tmp_path: Path) -> None:
    before = inspect(open_checkpoint(calibrated))
    assert [(r["site"], r["format"]) for r in before["outside_blocks"]] == [
        ("embedding", "bfloat16"),
        ("head", "bfloat16"),
    ]
    result = pack(calibrated, BOTH, Target(tmp_path / "out"))
    plain = pack(calibrated, PackOptions("osc"), Target(tmp_path / "plain"))
    data, other = (inspect(open_checkpoint(r.output)) for r in (result, plain))
    assert [(r["site"], r["format"], r["bits_per_weight"]) for r in data["outside_blocks"]] == [
        ("embedding", "mxfp8", 8.25),
        ("head", "mxfp8", 8.25),
    ]
    assert data["bits_per_weight"] == other["bits_per_weight"], "of the blocks alone"
    assert data["parameters"] == other["parameters"] == before["parameters"]
    saved = 2 * 256 * 64 * (16 - 8.25) / 8
    assert other["bytes"] - data["bytes"] == saved
    assert result.model_bits == data["bits_per_parameter"]
    assert "head" in as_text(data)


def test_json_round_trip() -> None:
    scheme = build("osc").with_ends(SiteFormat("mxfp8", "mxfp8"), None)
    assert from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert build("osc").with_ends(None, None) == build("osc")


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 1},
        {"format_version": 3},
        {"head": {"weights": "none", "activations": "none"}},
        {"head": {"weights": "mxfp8", "activations": "mxfp8", "branch": "bf16", "outliers": 16}},
        {"head": {"weights": "mxfp8", "activations": "mxfp8", "hadamard": {"block": 32}}},
        {"head": "mxfp8"},
        {"embedding": {"weights": "mxfp8", "activations": "mxfp8"}},
        {"embedding": ["mxfp8"]},
    ],
)
def test_hostile_json_is_rejected(change: dict[str, Any]) -> None:
    eight = SiteFormat("mxfp8", "mxfp8")
    data = build("osc").with_ends(eight, SiteFormat("mxfp8", "none")).to_json()
    from_json(data)
    with pytest.raises(InputRejected):
        from_json(data | change)
