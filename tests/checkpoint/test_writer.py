"""Outputs are whole or absent, and the same bytes whatever interrupted them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.manifest import Step
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.errors import InputRejected, QuantkitError, UsageError
from tests.checkpoint.folders import contents, sharded


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for f in sorted(folder.glob("model*.safetensors")) for k, v in load_file(f).items()
    }


def test_keeping_everything_links_the_shards(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        writer.keep_rest()
        writer.finish(Step("calibrate"))
    for name, real in source.shards.items():
        assert (tmp_path / "out" / name).stat().st_ino == real.stat().st_ino
    again = open_checkpoint(tmp_path / "out")
    assert again.weights_digest() == source.weights_digest()
    names = set(contents(tmp_path / "out"))
    assert {"config.json", "tokenizer.json", "quantkit.json"} <= names
    assert not {"modeling_own.py", "pytorch_model.bin"} & names
    assert not (tmp_path / "out.partial").exists()


def test_a_changed_tensor_costs_its_shard_only(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
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
    source = open_checkpoint(sharded(tmp_path / "in"))
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
    source = open_checkpoint(sharded(tmp_path / "in"))
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
    source = open_checkpoint(sharded(tmp_path / "in"))
    with (
        CheckpointWriter(tmp_path / "out", source, fingerprint={}),
        pytest.raises(QuantkitError, match="another run"),
        CheckpointWriter(tmp_path / "out", source, fingerprint={}),
    ):
        pass


def test_overwrite_replaces_only_with_a_whole_output(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    with (
        pytest.raises(UsageError, match="exists already"),
        CheckpointWriter(out, source, fingerprint={}),
    ):
        pass
    assert not (tmp_path / "out.partial").exists()
    with CheckpointWriter(out, source, fingerprint={}, overwrite=True) as writer:
        writer.keep_rest()
        assert (out / "precious").read_text() == "old"
        writer.finish(Step("x"))
    assert not (out / "precious").exists()
    open_checkpoint(out)


def test_a_failure_between_the_renames_of_an_overwrite_puts_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")

    def run() -> None:
        with CheckpointWriter(out, source, fingerprint={}, overwrite=True) as writer:
            writer.keep_rest()
            writer.finish(Step("x"))

    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name == "whole":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (out / "precious").read_text() == "old"
    monkeypatch.undo()
    run()
    assert not (out / "precious").exists()


@pytest.mark.parametrize("output", ["in", "in/below", "."])
def test_the_output_may_not_touch_the_input(tmp_path: Path, output: str) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with (
        pytest.raises(UsageError, match="cannot be the input"),
        CheckpointWriter(tmp_path / output, source, fingerprint={}, overwrite=True),
    ):
        pass


def test_a_tensor_nobody_decided_on_is_not_lost(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        writer.keep("layer.0.0")
        with pytest.raises(RuntimeError, match="neither kept nor written"):
            writer.finish(Step("x"))
    assert not (tmp_path / "out").exists()


def test_shards_stay_below_the_limit_and_a_bigger_tensor_has_its_own(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    values = {f"n{i:02d}": torch.full((100 + 8 * i,), i, dtype=torch.uint8) for i in range(20)}
    values["n10"] = torch.zeros(4000, dtype=torch.uint8)
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}, max_shard_size=1000) as writer:
        for name in source.names():
            writer.drop(name)
        for name, value in values.items():
            writer.write(name, value)
        writer.finish(Step("x"))
    checkpoint = open_checkpoint(tmp_path / "out")
    for shard in checkpoint.shards:
        inside = [t for t in checkpoint.tensors.values() if t.shard == shard]
        assert sum(t.nbytes for t in inside) <= 1000 or len(inside) == 1
    assert {n: checkpoint.read(n).tolist() for n in values} == {
        n: v.tolist() for n, v in values.items()
    }


def test_a_header_that_is_full_starts_a_new_shard(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        writer.keep_rest()
        for i in range(200):  # names alone fill the room reserved for the header
            writer.write(f"{'long' * 50}.{i}", torch.zeros(8))
        writer.finish(Step("x"))
    assert len(loaded(tmp_path / "out")) == 206


def test_every_size_and_dtype_is_read_back_by_the_library(tmp_path: Path) -> None:
    """Tensors of odd sizes would misalign those behind them, which loaders do not forgive."""
    source = open_checkpoint(sharded(tmp_path / "in"))
    values: dict[str, torch.Tensor] = {}
    for i, dtype in enumerate([torch.uint8, torch.bfloat16, torch.float32, torch.int64] * 3):
        values[f"v{i}"] = torch.arange(1 + 3 * i).to(dtype)
        values[f"s{i}"] = torch.tensor(i).to(dtype)
        values[f"e{i}"] = torch.empty(0, 3, dtype=dtype)
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        for name, value in values.items():
            writer.write(name, value)
            assert torch.equal(writer.read(name), value)
        writer.keep_rest()
        writer.finish(Step("x"))
    out = loaded(tmp_path / "out")
    for name, value in values.items():
        assert out[name].dtype == value.dtype
        assert torch.equal(out[name], value)


def test_statistics_go_along_only_with_the_same_weights(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "calibrated", source, fingerprint={}) as writer:
        writer.write_file("statistics.safetensors", b"s")
        writer.write_file("outliers.json", b"p")
        writer.keep_rest()
        writer.finish(Step("calibrate"))
    source = open_checkpoint(tmp_path / "calibrated")
    for name, change in [("same", False), ("changed", True)]:
        with CheckpointWriter(tmp_path / name, source, fingerprint={}) as writer:
            if change:
                writer.write("layer.0.0", torch.zeros(8, 16))
            writer.keep_rest()
            writer.finish(Step("x"))
        for file in ("statistics.safetensors", "outliers.json"):
            assert (tmp_path / name / file).exists() is not change
    with CheckpointWriter(tmp_path / "dropped", source, fingerprint={}) as writer:
        writer.keep_rest()
        writer.drop_file("outliers.json")
        writer.write_file("config.json", b'{"model_type": "other"}')
        writer.finish(Step("x"))
    assert not (tmp_path / "dropped" / "outliers.json").exists()
    assert open_checkpoint(tmp_path / "dropped").config == {"model_type": "other"}


def test_new_statistics_leave_those_of_the_input_as_they_are(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in")
    for name in ("statistics.safetensors", "outliers.json"):
        (source / name).write_bytes(b"old")
    with CheckpointWriter(tmp_path / "out", open_checkpoint(source), fingerprint={}) as writer:
        writer.keep_rest()
        writer.write_file("statistics.safetensors", b"new")
        writer.finish(Step("calibrate"))
    assert (tmp_path / "out" / "statistics.safetensors").read_bytes() == b"new"
    for name in ("statistics.safetensors", "outliers.json"):
        assert (source / name).read_bytes() == b"old"


def test_the_manifest_tells_every_step_and_saves_the_next_digest(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    for name, verb in [("a", "calibrate"), ("b", "smooth")]:
        with CheckpointWriter(tmp_path / name, source, fingerprint={}) as writer:
            writer.write("layer.0.0", torch.full((8, 16), 3.0))
            writer.keep_rest()
            writer.finish(Step(verb, options={"alpha": 0.5}, seed=1))
        source = open_checkpoint(tmp_path / name)
    assert source.manifest is not None
    assert [step.verb for step in source.manifest.steps] == ["calibrate", "smooth"]
    assert source._recorded_digests() is not None
    recorded = source.weights_digest()
    assert recorded == source.manifest.weights_digest
    (tmp_path / "b" / "quantkit.json").unlink()
    assert open_checkpoint(tmp_path / "b").weights_digest() == recorded


def test_a_shard_changed_behind_the_manifests_back_is_hashed_again(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        for name in source.names():
            writer.write(name, source.read(name))
        writer.finish(Step("x"))
    before = open_checkpoint(tmp_path / "out").weights_digest()
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = tmp_path / "out" / "quantkit.json"
    later = manifest.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    assert open_checkpoint(tmp_path / "out").weights_digest() != before


def test_without_hard_links_shards_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", across)
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        writer.write("x", torch.ones(8))
        writer.keep_rest()
        writer.finish(Step("x"))
    for real in open_checkpoint(tmp_path / "out").shards.values():
        assert real.stat().st_nlink == 1
    assert open_checkpoint(tmp_path / "out").read("x").tolist() == [1] * 8


def test_output_is_read_by_transformers_with_equal_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import save_tiny

    source = open_checkpoint(save_tiny(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}, max_shard_size=60_000) as w:
        for name in source.names()[::2]:
            w.write(name, source.read(name))
        w.keep_rest()
        w.finish(Step("x"))
    ids = torch.arange(40).view(2, 20)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "in")(ids).logits
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert torch.equal(before, after)
    assert len(open_checkpoint(tmp_path / "out").shards) > 1


def test_what_a_power_cut_left_half_written_is_done_again(tmp_path: Path) -> None:
    """The journal may be ahead of the data: a tensor whose bytes lack is not taken as done."""
    source = open_checkpoint(sharded(tmp_path / "in"))

    def begin() -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "out", source, fingerprint={})

    with begin() as writer:
        writer.write("first", torch.ones(64))
        writer.flush()
        writer.write("second", torch.ones(64))
        writer.write("third", torch.ones(64))
        journal = (tmp_path / "out.partial" / "journal").read_bytes()
    # As if the last flush had not happened and the second tensor's pages had been lost.
    shard = tmp_path / "out.partial" / "data" / "shard-000001"
    (tmp_path / "out.partial" / "journal").write_bytes(journal + b'{"name": "torn')
    data = bytearray(shard.read_bytes())
    data[-512:-256] = bytes(256)
    shard.write_bytes(data)
    with begin() as writer:
        assert [writer.done(n) for n in ("first", "second", "third")] == [True, False, False]
        for name in ("second", "third"):
            writer.write(name, torch.ones(64))
        writer.keep_rest()
        writer.finish(Step("x"))
    assert torch.equal(open_checkpoint(tmp_path / "out").read("second"), torch.ones(64))


def test_scratch_lives_as_long_as_the_run(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        (writer.scratch / "state").write_text("half")
    with CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer:
        assert (writer.scratch / "state").read_text() == "half"
        writer.keep_rest()
        writer.finish(Step("x"))
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_an_unknown_tensor_cannot_be_kept(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "in"))
    with (
        pytest.raises(InputRejected, match="missing"),
        CheckpointWriter(tmp_path / "out", source, fingerprint={}) as writer,
    ):
        writer.keep("nothing")
