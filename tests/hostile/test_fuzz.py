"""A short run of the fuzzer on every test run, and properties of the reader by hypothesis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from quantkit.checkpoint.header import DTYPES, read_header
from quantkit.checkpoint.manifest import Manifest, Step, read_manifest
from quantkit.checkpoint.reader import INDEX, open_checkpoint
from quantkit.checkpoint.safety import strict_json
from quantkit.errors import InputRejected, QuantkitError, one_line
from tests.checkpoint.folders import safetensors, single
from tests.hostile import fuzz


def test_damaged_checkpoints_are_read_or_refused() -> None:
    failed, figures = fuzz.run(first=0, cases=1500)
    assert not failed, f"python -m tests.hostile.fuzz --first {failed[0]} --cases 1"
    assert figures["peak_growth_mb"] < 200
    assert figures["accepted"] > 100  # else the damage is too heavy to get anywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single(tmp_path_factory.mktemp("fuzz"))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "weight_map", *DTYPES]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(max_size=10) | st.sampled_from(["dtype", "shape", "data_offsets", "steps"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
small = st.integers(-1, 9)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "U8", "BF16", "F4", "X"]),
        "shape": st.lists(small, max_size=3),
        "data_offsets": st.lists(small, min_size=2, max_size=2),
    }
)


@given(data=st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_as_a_file(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputRejected):
        open_checkpoint(folder)


@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c"]), entries | anything, max_size=3),
    data=st.binary(max_size=12),
    pad=st.integers(0, 3),
)
@settings(max_examples=400, deadline=None)
def test_what_is_accepted_the_library_accepts_too(
    folder: Path, header: dict[str, object], data: bytes, pad: int
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors(json.dumps(header).encode() + b" " * pad, data))
    try:
        mine = {info.name: info for info in read_header(path)}
    except InputRejected:
        return
    try:
        with safe_open(path, "pt") as file:
            theirs = set(file.keys())
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")
    assert set(mine) == theirs
    assert sum(info.nbytes for info in mine.values()) == len(data)


@given(value=anything)
@settings(max_examples=200, deadline=None)
def test_any_json_as_config_index_or_manifest(folder: Path, value: object) -> None:
    good = safetensors({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"ab")
    (folder / "model.safetensors").write_bytes(good)
    text = json.dumps(value)
    for name in ("config.json", INDEX, "quantkit.json"):
        (folder / "config.json").write_text("{}")
        (folder / name).write_text(text)
        fuzz.allowed(lambda: open_checkpoint(folder))
        (folder / name).unlink()


@given(
    options=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5),
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
        max_size=4,
    ),
    verb=st.text(st.characters(codec="utf-8")),
    seed=st.none() | st.integers(0, 2**63),
)
@settings(max_examples=100, deadline=None)
def test_a_manifest_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object], verb: str, seed: int
) -> None:
    place = tmp_path_factory.mktemp("manifest")
    manifest = Manifest([Step(verb, options, seed)], "digest", {"w": "00"})
    try:
        text = manifest.encode()
    except UnicodeEncodeError:
        return
    (place / "quantkit.json").write_bytes(text)
    assert read_manifest(place) == manifest


@pytest.mark.parametrize(
    "text", [b'"\\ud800"', b'{"a": 1e999}', b"[" + b"1" * 21 + b"]", b'{"\\uDC00":1}']
)
def test_json_that_could_not_be_written_again(text: bytes) -> None:
    with pytest.raises(InputRejected):
        strict_json(text, Path("x"))


@given(text=st.text())
def test_errors_are_one_printable_line(text: str) -> None:
    error = QuantkitError(text * 50, text)
    assert error.message.isprintable()
    assert len(error.message) <= 1000
    assert error.hint == one_line(text)
