"""Headers: the literal bytes, and agreement with the safetensors library."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.header import DTYPES, encode_header, read_header
from quantkit.checkpoint.reader import open_checkpoint, tensor_bytes
from tests.checkpoint.folders import single


def test_encoded_header_is_literally_this() -> None:
    rows = [("a", torch.bfloat16, (2, 3), 0, 12), ("é", torch.uint8, (), 12, 13)]
    text = (
        '{"__metadata__":{"format":"pt"},'
        '"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"é":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    ).encode()
    assert encode_header(rows, 256) == struct.pack("<Q", 248) + text + b" " * (248 - len(text))
    with pytest.raises(ValueError, match="does not fit"):
        encode_header(rows, 100)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 4), (2, 3, 6)], ids=str)
def test_every_dtype_reads_as_the_library_wrote_it(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if dtype is torch.float4_e2m1fn_x2 and not shape:
        pytest.skip("pairs of 4-bit elements have a dimension")
    count = int(torch.tensor(shape).prod()) if shape else 1
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (count * dtype.itemsize,), generator=generator).to(torch.uint8)
    tensor = raw.view(dtype).view(shape)
    single(tmp_path)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    read = checkpoint.read("x")
    assert read.dtype == dtype
    assert tuple(read.shape) == shape
    assert checkpoint.tensors["x"].shape == shape
    assert bytes(tensor_bytes(read)) == bytes(tensor_bytes(tensor.contiguous()))


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]), min_size=6
    ),
)
@settings(max_examples=60, deadline=None)
def test_layout_agrees_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype]
) -> None:
    path = tmp_path_factory.mktemp("layout") / "model.safetensors"
    tensors = {f"t{i}": torch.ones(s, dtype=dtypes[i]) for i, s in enumerate(shapes)}
    save_file(tensors, path)
    mine = {t.name: (t.dtype, t.shape) for t in read_header(path)}
    assert mine == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_our_padded_header_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rows = [("b", torch.float32, (2,), 0, 8), ("a", torch.uint8, (3,), 8, 11)]
    path.write_bytes(encode_header(rows, 4096) + struct.pack("<ff", 1.5, -2) + b"\1\2\3")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_file(path)
    assert loaded["b"].tolist() == [1.5, -2]
    assert loaded["a"].tolist() == [1, 2, 3]
