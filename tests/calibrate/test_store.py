"""Statistics files: what is read back, and files from strangers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.calibrate import store
from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.calibrate.store import FILE, Statistics, combine, load_statistics, open_statistics
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected
from tests.tiny import VOCAB, save_tiny


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_tiny(Path("model"), "llama")
        generator = torch.Generator().manual_seed(9)
        save_file({"ids": torch.randint(0, VOCAB, (8, 32), generator=generator)}, "t.safetensors")
        calibrate("model", Options(data="t.safetensors", device="cpu"), Target())
    return folder / "model-calibrated"


def test_sites_in_the_order_of_the_model(calibrated: Path) -> None:
    statistics = load_statistics(open_checkpoint(calibrated))
    keys = statistics.keys()
    assert len(keys) == 8
    assert [key.split(".")[1] for key in keys] == ["0"] * 4 + ["1"] * 4
    names = [f"layers.{i}.experts.{e}.mlp_out" for i in (0, 2, 10) for e in (1, 9, 11)]
    fake = {f"{name}/count": statistics.tensors["layers.0.attn_in/count"] for name in names[::-1]}
    assert Statistics(calibrated, {}, fake).keys() == names


def test_quantiles_reach_as_low_as_said(calibrated: Path) -> None:
    statistics = load_statistics(open_checkpoint(calibrated))
    key = "layers.0.mlp_out"
    lowest = statistics.lowest_quantile(key)
    assert 0.98 < lowest <= 0.99
    tail = statistics.get(key, "tail")
    assert torch.equal(statistics.quantile(key, lowest), tail[:, -1].float())
    assert torch.equal(statistics.quantile(key, 0.5), tail[:, -1].float())
    assert torch.equal(statistics.quantile(key, 1.0), statistics.get(key, "absmax"))
    with pytest.raises(InputRejected, match="no median"):
        statistics.get(key, "median")


def test_joined_files_are_read_by_safetensors(calibrated: Path, tmp_path: Path) -> None:
    first = {
        "a/tail": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a/absmax": torch.rand(2),
        "a/count": torch.tensor(3),
    }
    second = {
        "b/mean": torch.rand(5, dtype=torch.float64),
        "b/absmax": torch.rand(5),
        "b/count": torch.tensor(1),
    }
    for name, tensors in (("one", first), ("two", second)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    parts = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    joined = b"".join(bytes(piece) for piece in combine(parts, {"weights_digest": "d"}))
    (tmp_path / "all.safetensors").write_bytes(joined)
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == (first | second).keys()
    for name, tensor in (first | second).items():
        assert torch.equal(found[name], tensor)
    statistics = open_statistics(tmp_path / "all.safetensors")
    assert statistics.meta["weights_digest"] == "d"
    assert statistics.get("b", "mean").tolist() == second["b/mean"].tolist()
    again = b"".join(bytes(p) for p in combine(parts[::-1], {"weights_digest": "d"}))
    assert again == joined


def stranger(tmp_path: Path, calibrated: Path, data: bytes) -> Path:
    folder = tmp_path / "stranger"
    if not folder.exists():
        folder.mkdir()
        for file in calibrated.iterdir():
            if file.name != FILE:
                (folder / file.name).write_bytes(file.read_bytes())
    (folder / FILE).write_bytes(data)
    return folder


def rewritten(calibrated: Path, **changes: torch.Tensor | None) -> bytes:
    """The file with some tensors replaced or, for None, left out."""
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(calibrated / FILE, framework="pt") as opened:
        meta = opened.metadata()
    tensors = load_file(calibrated / FILE) | changes
    return save({k: v for k, v in tensors.items() if v is not None}, metadata=meta)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers.0.attn_in/absmax": torch.zeros(63)},
        {"layers.0.attn_in/absmax": torch.zeros(64, dtype=torch.int32)},
        {"layers.0.attn_in/tail": torch.zeros(64)},
        {"layers.0.attn_in/tail": torch.zeros(64, 0)},
        {"layers.0.attn_in/count": torch.zeros(1, dtype=torch.int64)},
        {"layers.0.attn_in/hits32": torch.zeros(64)},
        {"layers.0.attn_in/qualify32": torch.zeros(3, dtype=torch.int64)},
        {"layers.0.attn_in/qualify0": torch.zeros(3, dtype=torch.int64)},
        {"layers.9.attn_in/absmax": torch.zeros(64)},
        {"nonsense": torch.zeros(64)},
        {"layers.0.attn_in/more": torch.zeros(64)},
        {"layers.0.attn_in/absmax": None},
        {"layers.0.attn_in/tail": torch.zeros(64, 2, 2)},
        {
            f"layers.0.attn_in/{name}": torch.zeros(size, dtype=dtype)
            for name, size, dtype in [
                ("absmax", 63, torch.float32),
                *((n, 63, torch.float64) for n in ("mean", "m2", "m3", "m4", "energy", "abs_mean")),
                *((n, 63, torch.int64) for n in ("hits32", "hits64", "hits128")),
                ("tail", (63, 2), torch.float32),
            ]
        },
    ],
)
def test_wrong_shapes(calibrated: Path, tmp_path: Path, changes: dict) -> None:
    folder = stranger(tmp_path, calibrated, rewritten(calibrated, **changes))
    with pytest.raises(InputRejected, match="fits no site"):
        load_statistics(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("energy", float("nan"), "NaN or infinite"),
        ("absmax", float("inf"), "NaN or infinite"),
        ("absmax", -1.0, "negative"),
        ("hits32", -1, "negative"),
        ("count", -1, "negative"),
    ],
)
def test_wrong_values(calibrated: Path, tmp_path: Path, name: str, value: float, says: str) -> None:
    """What is not read yet may be wrong; what is read is checked."""
    name = f"layers.0.attn_in/{name}"
    wrong = load_file(calibrated / FILE)[name].clone()
    wrong.view(-1)[-1] = value
    statistics = load_statistics(
        open_checkpoint(stranger(tmp_path, calibrated, rewritten(calibrated, **{name: wrong})))
    )
    with pytest.raises(InputRejected, match=says):
        statistics.get(*name.split("/"))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"quantkit": "no json"},
        {"quantkit": "[]"},
        {"quantkit": "{}"},
        {"quantkit": json.dumps({"format": 99, "weights_digest": "x"})},
        {"quantkit": json.dumps({"format": 1, "weights_digest": 5})},
    ],
)
def test_wrong_metadata(calibrated: Path, tmp_path: Path, metadata: dict | None) -> None:
    save_file({"a/count": torch.tensor(1)}, tmp_path / FILE, metadata=metadata)
    with pytest.raises(InputRejected):
        open_statistics(tmp_path / FILE)
    assert store.FORMAT == 1


def test_mutated_files_never_trace(calibrated: Path, tmp_path: Path) -> None:
    """Random bytes of the header and lengths changed: refused, or read as tensors."""
    data = (calibrated / FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(1)
    refused = 0
    folder = stranger(tmp_path, calibrated, data)
    checkpoint = open_checkpoint(folder)
    checkpoint.weights_digest()
    for case in range(400):
        mutated = bytearray(data)
        for place in torch.randint(0, header, (1 + case % 5,), generator=generator).tolist():
            mutated[place] = int(torch.randint(0, 256, (), generator=generator))
        if case % 7 == 0:
            mutated = mutated[: int(torch.randint(0, len(data), (), generator=generator))]
        (folder / FILE).write_bytes(mutated)
        try:
            statistics = load_statistics(checkpoint)
            for name in statistics.tensors:
                statistics.get(*name.rsplit("/", 1))
        except InputRejected:
            refused += 1
    assert refused > 200
