"""Second moments: sums that do not depend on who added what in which order."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibrate.parallel import Ranks
from quantkit.pack.moments import SecondMoment


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_in_any_order_and_over_any_processes_give_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    size = torch.logspace(-4, 3, 48)  # of the channels: outliers beside nearly nothing
    batches = [(torch.randn(256, 48, generator=generator) * size).to(dtype) for _ in range(9)]

    def mean(parts: list[list[int]]) -> torch.Tensor:
        totals = [SecondMoment(48, torch.device("cpu")) for _ in parts]
        for total, part in zip(totals, parts, strict=True):
            for b in part:
                total.add(batches[b])
        for other in totals[1:]:
            totals[0].total += other.total
        return totals[0].mean(9 * 256, Ranks())

    one = mean([[*range(9)]])
    assert torch.equal(one, mean([[8, 3, 1, 0, 2, 7, 6, 5, 4]]))
    assert torch.equal(one, mean([[0, 1, 2, 3], [4, 5, 6, 7, 8]]))
    assert torch.equal(one, mean([[7, 8], [0, 1, 2], [3, 4, 5, 6]]))
    x = torch.cat(batches).double()
    exact = x.t() @ x / len(x)
    root = exact.diagonal().sqrt()
    assert bool(((one - exact).abs() <= 1e-6 * torch.outer(root, root)).all())
