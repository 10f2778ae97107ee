"""Broken and malicious checkpoints: one line, exit code 3, nothing written, nothing run."""

from __future__ import annotations

import json
import os
import shlex
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.reader import INDEX, open_checkpoint
from quantkit.cli import main
from quantkit.errors import InputRejected, QuantkitError
from tests.checkpoint.folders import contents, entry, safetensors, sharded, single

GOOD = entry("U8", [4], 0, 4)

# Name of the attack: (bytes of model.safetensors, words of the message).
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "seven bytes": (b"1234567", "too few"),
    "header longer than the file": (safetensors({"a": GOOD}, b"abcd", length=10**6), "ends after"),
    "huge header": (safetensors({"a": GOOD}, b"abcd", length=2**63), "claims a header"),
    "header of no bytes": (safetensors(b"", b"abcd"), "bad JSON"),
    "header not JSON": (safetensors(b"{'a': 1}"), "bad JSON"),
    "header not an object": (safetensors(b"[]"), "not a JSON object"),
    "header not UTF-8": (safetensors(b'{"\xff\xfe": {}}'), "not UTF-8"),
    "deep header": (safetensors(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    "deep value": (safetensors(b'{"a":' * 90 + b"1" + b"}" * 90), "nested too deeply"),
    "same name twice": (
        safetensors(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            b'"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            b"abcd",
        ),
        "twice",
    ),
    "NaN in the header": (safetensors(b'{"a": NaN}'), "not a JSON number"),
    "number of 5000 digits": (safetensors(b'{"a": ' + b"1" * 5000 + b"}"), "bad JSON"),
    "entry not an object": (safetensors({"a": [1]}), "lacks dtype"),  # type: ignore[dict-item]
    "entry lacks offsets": (safetensors({"a": {"dtype": "U8", "shape": [4]}}, b"abcd"), "lacks"),
    "entry has more": (safetensors({"a": GOOD | {"x": 1}}, b"abcd"), "lacks"),
    "unknown dtype": (safetensors({"a": GOOD | {"dtype": "U4"}}, b"abcd"), "unknown dtype"),
    "dtype not a name": (safetensors({"a": GOOD | {"dtype": ["U8"]}}, b"abcd"), "unknown dtype"),
    "negative shape": (safetensors({"a": entry("U8", [-4], 0, 4)}, b"abcd"), "shape"),
    "fractional shape": (safetensors({"a": entry("U8", [4.0], 0, 4)}, b"abcd"), "shape"),
    "boolean shape": (safetensors({"a": entry("U8", [True], 0, 1)}, b"a"), "shape"),
    "shape overflows": (safetensors({"a": entry("U8", [2**40, 2**40], 0, 0)}), "shape"),
    "empty but enormous": (safetensors({"a": entry("U8", [0, 2**40, 2**40], 0, 0)}), "shape"),
    "a thousand dimensions": (safetensors({"a": entry("U8", [1] * 1000, 0, 1)}, b"a"), "shape"),
    "shape and offsets disagree": (safetensors({"a": entry("U8", [5], 0, 4)}, b"abcd"), "disagree"),
    "odd 4-bit columns": (safetensors({"a": entry("F4", [3], 0, 1)}, b"a"), "odd number"),
    "offsets backwards": (safetensors({"a": entry("U8", [4], 4, 0)}, b"abcd"), "data_offsets"),
    "offsets negative": (safetensors({"a": entry("U8", [4], -4, 0)}, b"abcd"), "data_offsets"),
    "offsets not numbers": (safetensors({"a": entry("U8", [4], "0", "4")}, b"abcd"), "offsets"),
    "offsets past the end": (safetensors({"a": entry("U8", [9], 0, 9)}, b"abcd"), "truncated"),
    "overlapping": (
        safetensors({"a": GOOD, "b": entry("U8", [4], 2, 6)}, b"abcdef"),
        "overlaps",
    ),
    "same bytes twice": (safetensors({"a": GOOD, "b": GOOD}, b"abcd"), "overlaps"),
    "hole": (safetensors({"a": GOOD, "b": entry("U8", [1], 5, 6)}, b"abcdef"), "hole"),
    "hole at the start": (safetensors({"a": entry("U8", [3], 1, 4)}, b"abcd"), "hole"),
    "bytes of no tensor": (safetensors({"a": GOOD}, b"abcdef"), "no tensor"),
    "name with an escape sequence": (safetensors({"\x1b[2J": GOOD}, b"abcd"), "not a name"),
    "half a surrogate pair": (
        safetensors(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a"),
        "not UTF-8",
    ),
    "endless name": (safetensors({"a" * 5000: GOOD}, b"abcd"), "not a name"),
    "metadata not strings": (
        safetensors({"__metadata__": {"a": 1}, "a": GOOD}, b"abcd"),
        "__metadata__",
    ),
    "a pickle by that name": (b"\x80\x04\x95" + bytes(200), "ends after"),
    "a zip by that name": (b"PK\x03\x04" + bytes(200), "claims a header"),
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
        "Git LFS",
    ),
    "JSON bomb": (safetensors(b"{" + b'"a":[[],[],' * 300_000), "too many values"),
}


def rejected(folder: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    """The library raises and the command says it in one line, with exit code 3."""
    before = contents(folder) if folder.is_dir() else {}
    with pytest.raises(InputRejected) as caught:
        open_checkpoint(folder)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(folder)])
    assert left.value.code == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == f"error: {caught.value.message}"
    assert len(lines) <= 2
    if folder.is_dir():
        assert contents(folder) == before


@pytest.mark.parametrize("attack", FILES)
def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str) -> None:
    data, words = FILES[attack]
    rejected(single(tmp_path / "m", data), capsys, words)


def test_every_truncation_of_a_good_file(tmp_path: Path) -> None:
    good = safetensors({"a": GOOD, "b": entry("BF16", [2], 4, 8)}, b"abcdefgh")
    for length in range(len(good)):
        with pytest.raises(InputRejected):
            open_checkpoint(single(tmp_path, good[:length]))


CONFIGS = {
    b"": "bad JSON",
    b"[]": "not a JSON object",
    b"null": "not a JSON object",
    b'{"model_type": "llama", "model_type": "x"}': "twice",
    b'{"a": NaN}': "not a JSON number",
    b'{"a": -Infinity}': "not a JSON number",
    b"\xff\xfe{\x00}\x00": "not UTF-8",
    b'{"a":' * 5000 + b"1" + b"}" * 5000: "nested too deeply",
    b'{"a": [' + b"0," * 3_000_000 + b"0]}": "too many values",
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: repr(c[:30]))
def test_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: bytes) -> None:
    rejected(single(tmp_path / "m", config=config), capsys, CONFIGS[config])


def test_remote_code_of_a_config_never_runs(tmp_path: Path) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}
    folder = single(tmp_path / "m", config=json.dumps(config).encode())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(folder)])
    assert left.value.code == 0
    assert not (tmp_path / "ran").exists()


def outside(folder: Path) -> Path:
    return single(folder.parent / "outside") / "model.safetensors"


def with_index(name: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside(folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))

    return change


def link(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = outside(folder).parent / name
        if not target.exists():
            target.write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(os.path.relpath(target, folder))

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


ESCAPES: dict[str, tuple[Callable[[Path], None], str]] = {
    "index names a file above": (with_index("../outside/model.safetensors"), "outside the folder"),
    "index names an absolute path": (with_index("/etc/passwd"), "outside the folder"),
    "index names a file below": (with_index("sub/model.safetensors"), "outside the folder"),
    "index names dots": (with_index(".."), "outside the folder"),
    "index names nothing": (with_index(""), "outside the folder"),
    "index names a zero byte": (with_index("a\0.safetensors"), "outside the folder"),
    "index names a backslash": (with_index("..\\a.safetensors"), "outside the folder"),
    "index names a pickle": (with_index("pytorch_model.bin"), "not a safetensors file"),
    "index names a number": (with_index(3), "not a"),
    "index names a list": (with_index(["model.safetensors"]), "not a"),
    "index names a missing file": (with_index("gone.safetensors"), "no such file"),
    "shard is a link out": (link("model.safetensors"), "leaves the folder"),
    "config is a link out": (link("config.json"), "leaves the folder"),
    "manifest is a link out": (link("quantkit.json"), "leaves the folder"),
    "index is a link out": (link(INDEX), "leaves the folder"),
    "shard is a pipe": (pipe("model.safetensors"), "not a plain file"),
    "config is a pipe": (pipe("config.json"), "not a plain file"),
    "shard is a link to itself": (loop, ""),
    "shard is a folder": (a_folder, "not a plain file"),
}


@pytest.mark.parametrize("attack", ESCAPES)
def test_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str) -> None:
    change, words = ESCAPES[attack]
    folder = single(tmp_path / "m")
    change(folder)
    with pytest.raises(InputRejected) as caught:
        open_checkpoint(folder)
    assert words in caught.value.message
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(folder)])
    assert left.value.code == 3
    assert capsys.readouterr().err.startswith("error: ")


def rewritten(folder: Path, weight_map: dict[str, str]) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_index_and_shards_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sharded(tmp_path / "m")
    good = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(good.values()))
    more = good | {"extra": first}
    rejected(rewritten(folder, more), capsys, "lacks tensor 'extra'")
    fewer = {name: shard for name, shard in good.items() if name != "layer.0.1"}
    rejected(rewritten(folder, fewer), capsys, "does not place there")
    moved = good | {"layer.0.1": second}
    rejected(rewritten(folder, moved), capsys, "does not place there")
    (folder / second).write_bytes((folder / first).read_bytes())
    rejected(rewritten(folder, good), capsys, "again in")
    rejected(rewritten(folder, {}), capsys, "no weight_map")


def test_folders_that_are_no_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected(tmp_path / "missing", capsys, "no such folder")
    (tmp_path / "file").touch()
    rejected(tmp_path / "file", capsys, "not a folder")
    (tmp_path / "empty").mkdir()
    rejected(tmp_path / "empty", capsys, "no model.safetensors")
    (single(tmp_path / "bare") / "config.json").unlink()
    rejected(tmp_path / "bare", capsys, "no config.json")


def test_pickles_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = single(tmp_path / "a model")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.arange(4, dtype=torch.uint8)}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(folder)])
    assert left.value.code == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert "pickled weights (pytorch_model.bin)" in error
    command = shlex.split(hint.split("quantkit ", 1)[1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    assert open_checkpoint(tmp_path / "a model-safetensors").read("a").tolist() == [0, 1, 2, 3]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder = single(tmp_path)
    checkpoint = open_checkpoint(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-2])
    with pytest.raises(QuantkitError, match="became shorter"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    "header",
    [
        b"[" + b"[]," * 5_000_000 + b"[]]",
        b'{"a":[' + b"0," * 8_000_000 + b"0]}",
        b"{" + b",".join(b'"%d":{}' % i for i in range(1_200_000)) + b"}",
    ],
    ids=["lists", "numbers", "objects"],
)
def test_a_header_of_many_small_values_stays_small_in_memory(tmp_path: Path, header: bytes) -> None:
    file = struct.pack("<Q", len(header)) + header
    folder = single(tmp_path, file)
    tracemalloc.start()
    try:
        with pytest.raises(InputRejected):
            open_checkpoint(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * 2**20
