"""The expected loss of a format at a site is the divergence it really causes, to second order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.diagnose.packing import rounder
from quantkit.diagnose.switches import PLAIN, install
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.pack.job import Job, PackOptions, prepare
from quantkit.plan.sensitivity import Costs, sensitivities
from tests.tiny import VOCAB, calibrate_tiny

WINDOWS = 16


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (WINDOWS, 65), generator=torch.Generator().manual_seed(1))


def louder(folder: Path) -> None:
    """Make predictions of the random model depend on its input: a louder head."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 12
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate_tiny(
        tmp_path_factory.mktemp(request.param), request.param, dtype=torch.float32, change=louder
    )


def runner_of(folder: Path) -> BlockRunner:
    checkpoint = open_checkpoint(folder)
    return BlockRunner(checkpoint, describe(checkpoint.config, checkpoint.tensors))


def logits(runner: BlockRunner, jobs: dict[str, Job], key: str | None, name: str) -> Tensor:
    """Log odds [tokens, vocabulary] with one site rounded."""
    with torch.no_grad():
        hidden = runner.embed(tokens())
        for layer in range(runner.layout.n_layers):
            block = runner.load(layer)
            for switch in install(block, runner.layout, layer, rounder(jobs), {}).values():
                switch.set(name if switch.site.key == key else PLAIN)
            hidden = runner.forward(block, hidden)
        return runner.head(hidden)[:, :-1].float().log_softmax(-1).flatten(0, 1)


def test_costs_are_the_divergence_of_the_predictions(made: Path) -> None:
    runner, source = runner_of(made), open_checkpoint(made)
    jobs = {name: prepare(source, PackOptions(name)) for name in ("mxfp4", "mxfp8")}
    costs = sensitivities(runner, tokens(), jobs)
    assert set(costs) == set(runner.layout.by_key)
    plain = logits(runner, jobs, None, "mxfp4")
    measured, expected = [], []
    for key in costs:
        moved = logits(runner, jobs, key, "mxfp4")
        measured.append(float((plain.exp() * (plain - moved)).sum(-1).mean()))
        expected.append(costs[key]["mxfp4"])
        assert 0.5 < expected[-1] / measured[-1] < 1.5, (key, expected[-1], measured[-1])
        assert costs[key]["mxfp8"] < costs[key]["mxfp4"] / 10
    assert 0.75 < sum(expected) / sum(measured) < 1.25


def test_an_interrupted_run_gives_the_same_numbers(made: Path) -> None:
    runner, source = runner_of(made), open_checkpoint(made)
    jobs = {"mxfp4": prepare(source, PackOptions("mxfp4"))}
    steps: list[Costs] = []
    whole = sensitivities(runner, tokens(), jobs, keep=lambda found: steps.append(dict(found)))
    assert len(steps) == runner.layout.n_layers
    assert 0 < len(steps[0]) < len(whole)
    again = sensitivities(runner, tokens(), jobs, known=steps[0])
    assert again == whole


def test_the_head_gives_gradients_only_where_they_are_asked_for(made: Path) -> None:
    runner = runner_of(made)
    hidden = torch.randn(1, 4, runner.layout.hidden)
    assert not runner.head(hidden).requires_grad
    leaf = hidden.clone().requires_grad_()
    assert runner.head(leaf).requires_grad
    with torch.no_grad():
        assert not runner.head(leaf).requires_grad
    torch.testing.assert_close(runner.head(leaf).detach(), runner.head(hidden))
