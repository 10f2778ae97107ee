"""Outputs are whole or absent, and the same bytes whatever interrupted them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import QuantkitError, UsageError


def make(folder: Path, shards: int = 2, per_shard: int = 3) -> Path:
    """A small sharded checkpoint with a few files beside the weights."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    weight_map = {}
    for s in range(shards):
        name = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"layer.{s}.{i}": torch.randn(8, 16, generator=generator).to(torch.bfloat16)
            for i in range(per_shard)
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for f in sorted(folder.glob("model*.safetensors")) for k, v in load_file(f).items()
    }


def test_keeping_everything_links_the_shards(tmp_path: Path) -> None:
    source = open_checkpoint(make(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        writer.keep_rest()
        writer.finish(Step("calibrate"))
    for name, real in source.shards.items():
        assert (tmp_path / "out" / name).stat().st_ino == real.stat().st_ino
    again = open_checkpoint(tmp_path / "out")
    assert again.weights_digest() == source.weights_digest()
    names = set(contents(tmp_path / "out"))
    assert {"config.json", "tokenizer.json", "quantkit.json"} <= names
    assert not {"modeling_evil.py", "pytorch_model.bin"} & names
    assert not (tmp_path / "out.partial").exists()


def test_a_changed_tensor_costs_its_shard_only(tmp_path: Path) -> None:
    source = open_checkpoint(make(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        writer.write("layer.1.1", torch.full((8, 16), 2.0))
        writer.write("scalar", torch.tensor(3.0))
        writer.write("odd", torch.arange(3, dtype=torch.uint8))
        writer.write("codes", torch.arange(64, dtype=torch.uint8))
        writer.keep_rest()
        writer.finish(Step("smooth"))
    out = loaded(tmp_path / "out")
    before = loaded(tmp_path / "in")
    assert set(out) == {*before, "scalar", "odd", "codes"}
    for name, value in before.items():
        if name != "layer.1.1":
            assert torch.equal(out[name], value)
    assert torch.equal(out["layer.1.1"], torch.full((8, 16), 2.0))
    assert out["scalar"] == 3
    assert out["odd"].tolist() == [0, 1, 2]
    mine = open_checkpoint(tmp_path / "out")
    for name, value in out.items():
        assert torch.equal(mine.read(name), value)


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = open_checkpoint(make(tmp_path / "in"))
    values = {f"new.{i}": torch.full((8, 16 + i), float(i)) for i in range(6)}

    def run(output: Path, stop: int | None = None) -> None:
        with CheckpointWriter(output, source, fingerprint={"a": 1}, max_shard_size=1500) as writer:
            for i, (name, value) in enumerate(values.items()):
                if i == stop:
                    raise KeyboardInterrupt
                if not writer.done(name):
                    writer.write(name, value)
            writer.keep_rest()
            writer.finish(Step("pack"))

    run(tmp_path / "whole")
    for stop in range(6):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed", stop)
        assert not (tmp_path / "resumed").exists()
    run(tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_another_fingerprint_is_refused_by_name(tmp_path: Path) -> None:
    source = open_checkpoint(make(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={"scheme": "osc", "b": [1]}) as w:
        w.write("x", torch.ones(8))
    with (
        pytest.raises(UsageError, match="scheme was 'osc', now 'mxfp4'"),
        CheckpointWriter(tmp_path / "out", source, fingerprint={"scheme": "mxfp4", "b": [1]}),
    ):
        pass
    with CheckpointWriter(
        tmp_path / "out", source, fingerprint={"scheme": "mxfp4"}, restart=True
    ) as w:
        assert not w.done("x")


def test_two_runs_on_one_output_are_locked_out(tmp_path: Path) -> None:
    source = open_checkpoint(make(tmp_path / "in"))
    with (
        CheckpointWriter(tmp_path / "out", source, fingerprint={}),
        pytest.raises(QuantkitError, match="another run"),
        CheckpointWriter(tmp_path / "out", source, fingerprint={}),
    ):
        pass
