"""Reading: what is asked for and nothing else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputRejected
from tests.checkpoint.folders import sharded, single


def test_tensors_come_in_shard_order_with_their_values(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", shards=3)
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.shards) == sorted(p.name for p in folder.glob("*.safetensors"))
    shards = [checkpoint.tensors[name].shard for name in checkpoint.names()]
    assert shards == sorted(shards)
    for shard, real in checkpoint.shards.items():
        for name, value in load_file(real).items():
            assert checkpoint.tensors[name].shard == shard
            assert torch.equal(checkpoint.read(name), value)


@pytest.mark.parametrize("rows", [0, 2, -1, slice(1, 3), slice(0, 0), slice(-2, None)], ids=str)
def test_rows_are_torchs_rows(tmp_path: Path, rows: int | slice) -> None:
    value = torch.randn(4, 3, 2)
    save_file({"w": value}, single(tmp_path) / "model.safetensors")
    assert torch.equal(open_checkpoint(tmp_path).read_rows("w", rows), value[rows])


def test_rows_out_of_range_are_an_index_error(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4), "s": torch.ones(())}, single(tmp_path) / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, rows in [("w", 4), ("w", -5), ("w", slice(0, 4, 2)), ("s", 0)]:
        with pytest.raises(IndexError):
            checkpoint.read_rows(name, rows)


def test_read_into_given_memory(tmp_path: Path) -> None:
    value = torch.randn(4, 3)
    save_file({"w": value}, single(tmp_path) / "model.safetensors")
    out = torch.zeros(4, 3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("w", out=out) is out
    assert torch.equal(out, value)
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.read("w", out=torch.zeros(3, 4))


def test_many_threads_read_the_same_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "m"))
    expected = {name: checkpoint.read(name) for name in checkpoint.names()}
    checkpoint.close()
    wrong: list[str] = []

    def work() -> None:
        for name, value in expected.items():
            if not torch.equal(checkpoint.read(name), value):
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(checkpoint._files) == len(checkpoint.shards)


def test_digest_depends_on_content_only(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.arange(8.0) + i for i in range(4)}
    one = single(tmp_path / "one")
    save_file(tensors, one / "model.safetensors")
    two = single(tmp_path / "two")
    save_file(dict(reversed(tensors.items())), two / "model.safetensors", {"other": "metadata"})
    digest = open_checkpoint(one).weights_digest()
    assert open_checkpoint(two).weights_digest() == digest
    changes: list[dict[str, torch.Tensor]] = [
        tensors | {"t0": tensors["t0"] + 1},
        tensors | {"t0": tensors["t0"].view(2, 4)},
        tensors | {"t0": tensors["t0"].view(torch.int32)},
        {("u0" if k == "t0" else k): v for k, v in tensors.items()},
    ]
    for changed in changes:
        save_file(changed, two / "model.safetensors")
        assert open_checkpoint(two).weights_digest() != digest


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"tensor no\.such is missing"):
        open_checkpoint(single(tmp_path)).read("no.such")


def test_a_hub_cache_snapshot_may_link_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    real = single(tmp_path / "real")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in real.iterdir():
        (repository / "blobs" / f"hash-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert open_checkpoint(snapshot).read("a").tolist() == list(b"abcd")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(real / "config.json")
    with pytest.raises(InputRejected, match="leaves the folder"):
        open_checkpoint(snapshot)


def test_reading_does_not_keep_what_was_read(tmp_path: Path) -> None:
    """Reading and hashing 256 MB leaves a few tensors' worth resident, not the file."""
    folder = single(tmp_path)
    save_file(
        {f"t{i}": torch.zeros(16, 2**20, dtype=torch.uint8) for i in range(16)},
        folder / "model.safetensors",
    )
    checkpoint = open_checkpoint(folder)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for name in checkpoint.names():
        checkpoint.read(name)
    checkpoint.tensor_digests()
    assert resident() - before < 64 * 2**20
