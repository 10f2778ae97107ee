"""Hidden states on the disk: what was kept last stays whole until the next is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.calibrate.hidden import HiddenStates, kept_boundary


def states_at(boundary: int) -> torch.Tensor:
    return torch.full((2, 3, 4), float(boundary))


def made(folder: Path, memory: int) -> HiddenStates:
    return HiddenStates(folder, [(0, 2)], [0], (3, 4), torch.float32, memory)


@pytest.mark.parametrize("memory", [0, 10**6], ids=["in files", "in memory"])
@pytest.mark.parametrize("slow", [False, True])
def test_killed_at_any_boundary_the_kept_one_is_whole(
    memory: int, slow: bool, tmp_path: Path
) -> None:
    states = made(tmp_path, memory)
    states.put(0, 0, states_at(0))
    for boundary in range(1, 8):
        states.put(boundary, 0, states_at(boundary))
        if states.worth_keeping():
            states.keep()  # killed here, the mark still names the one before
            at = kept_boundary(tmp_path)
            if at is not None:
                again = made(tmp_path, memory)
                again.load(at)
                assert torch.equal(again.get(at, 0), states_at(at))
                again.close()
            states.mark()
        if slow:  # as if keeping had taken long: not every boundary is worth it
            states._cost = 0.0 if boundary % 3 == 0 else 1e9
        at = kept_boundary(tmp_path)
        assert at is not None
        again = made(tmp_path, memory)
        again.load(at)
        assert torch.equal(again.get(at, 0), states_at(at))
        again.close()
    states.close()
