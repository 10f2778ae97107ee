"""Slices of a branch: together they are the whole, and all have the same shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InputRejected, UsageError
from quantkit.pack.layout import index_tensor, padded
from quantkit.pack.scheme import SiteFormat
from quantkit.runtime.slices import check_slices, largest_count, slice_branch

OSC = SiteFormat("mxfp4", "mxfp4", "bf16", 32)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_slices_together_are_the_branch(data: st.DataObject) -> None:
    slices = data.draw(st.sampled_from([1, 2, 4, 8]))
    group = data.draw(st.sampled_from([0, 32, 64, 128]))
    width = 128 * slices
    chosen = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=40))
    if group:  # at most one of each group
        chosen = set({channel // group: channel for channel in chosen}.values())
    channels = torch.tensor(sorted(chosen))
    fmt = replace(OSC, group=group, outliers=padded(len(channels)))
    generator = torch.Generator().manual_seed(len(chosen))
    weight = torch.zeros(24, fmt.outliers, dtype=torch.bfloat16)
    weight[:, : len(channels)] = torch.randn(24, len(channels), generator=generator)
    x = torch.randn(3, width, generator=generator)
    tensors = {"outlier_weight": weight, "outlier_index": index_tensor(channels, fmt.outliers)}
    total, shapes = torch.zeros(3, 24), set()
    for rank, part in enumerate(x.chunk(slices, -1)):
        mine, own = slice_branch(tensors, fmt, width, slices, rank)
        index = mine["outlier_index"]
        assert mine["outlier_weight"].dtype == torch.bfloat16
        assert own.outliers == len(index) <= largest_count(fmt, width, slices)
        assert not mine["outlier_weight"][:, index < 0].any()
        real = index[index >= 0].long()
        assert torch.equal(real, real.sort().values)
        total += part[:, real] @ mine["outlier_weight"][:, : len(real)].float().T
        shapes.add((mine["outlier_weight"].shape, index.shape))
    assert len(shapes) == 1
    wanted = x[:, channels] @ weight[:, : len(channels)].float().T
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)


def test_eight_bit_branches_are_moved_as_bytes() -> None:
    weight = torch.arange(64).view(4, 16).to(torch.float8_e4m3fn)
    index = index_tensor(torch.arange(3, 512, 32), 16)
    fmt = replace(OSC, branch="fp8", outliers=16)
    parts = [
        slice_branch({"outlier_weight": weight, "outlier_index": index}, fmt, 512, 2, rank)[0]
        for rank in (0, 1)
    ]
    for rank, part in enumerate(parts):
        found = part["outlier_weight"][:, :8].view(torch.uint8)
        assert torch.equal(found, weight[:, 8 * rank : 8 * rank + 8].view(torch.uint8))


def test_more_channels_in_a_slice_than_the_plan_allows() -> None:
    crowded = index_tensor(torch.arange(48), 48)  # 48 neighbours: not one of each 32
    tensors = {"outlier_weight": torch.zeros(8, 48), "outlier_index": crowded}
    with pytest.raises(InputRejected, match="past its plan"):
        slice_branch(tensors, replace(OSC, outliers=48), 2048, 2, 0)
    beyond = {
        "outlier_weight": torch.zeros(8, 16),
        "outlier_index": index_tensor(torch.tensor([70]), 16),
    }
    with pytest.raises(InputRejected):
        slice_branch(beyond, replace(OSC, outliers=16), 64, 2, 0)


@pytest.mark.parametrize(
    ("fmt", "width", "slices"),
    [
        (OSC, 96, 2),  # 48 channels are no whole blocks of 32
        (OSC, 100, 3),
        (replace(OSC, hadamard={"size": 128}), 128, 2),
        (SiteFormat("nvfp4", "nvfp4"), 48, 2),
    ],
)
def test_slices_of_broken_blocks_are_refused(fmt: SiteFormat, width: int, slices: int) -> None:
    with pytest.raises(UsageError, match="slices of whole blocks"):
        check_slices(fmt, width, slices, "layers.0.mlp_out")
    check_slices(replace(fmt, hadamard=None), 256, 2, "layers.0.mlp_out")


def test_a_residual_branch_is_not_sliced() -> None:
    fmt = replace(OSC, branch="residual", outliers=32)
    with pytest.raises(UsageError, match="mlp_out: a residual branch does not cut into 2 slices"):
        check_slices(fmt, 256, 2, "layers.0.mlp_out")
    check_slices(fmt, 256, 1, "layers.0.mlp_out")
