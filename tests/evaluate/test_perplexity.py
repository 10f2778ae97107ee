"""Losses against transformers' own, and the excess with its paired standard error."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.evaluate import perplexity
from tests.tiny import VOCAB, tiny_model


def tokens(windows: int = 3, length: int = 32) -> torch.Tensor:
    return torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(0))


def test_mean_is_the_loss_transformers_computes() -> None:
    model, ids = tiny_model(), tokens()
    nll = perplexity.negative_log_likelihood(model, ids)
    assert nll.shape == (3, 31)
    assert nll.dtype == torch.float32
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    assert float(nll.mean()) == pytest.approx(float(expected), rel=1e-6)
    summary = perplexity.summarise(nll)
    assert summary.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_batches_and_types_of_ids_change_nothing(dtype: torch.dtype) -> None:
    model, ids = tiny_model(), tokens(5)
    one = perplexity.negative_log_likelihood(model, ids)
    many = perplexity.negative_log_likelihood(model, ids.to(dtype), batch=3)
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_long_windows_are_turned_into_losses_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), tokens(2, 100)
    whole = perplexity.negative_log_likelihood(model, ids)
    monkeypatch.setattr(perplexity, "ROWS", 7)
    assert torch.equal(perplexity.negative_log_likelihood(model, ids), whole)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)).bfloat16() * 8
    targets = torch.tensor([0, 1, 2, 3])
    losses = perplexity.token_losses(logits, targets)
    exact = -torch.log_softmax(logits.double(), -1)[range(4), targets]
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


def test_excess_is_paired_by_window() -> None:
    base = torch.tensor([[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]])
    excess = perplexity.compare(base, base + torch.tensor([[0.1], [0.2], [0.3]]))
    assert excess.mean == pytest.approx(0.2)
    # standard deviation of (0.1, 0.2, 0.3) is 0.1; the windows' own levels do not enter
    assert excess.stderr == pytest.approx(0.1 / math.sqrt(3), rel=1e-4)
    assert str(excess) == "+0.2000 ± 0.0577"


def test_one_window_has_no_error_and_other_tokens_are_refused() -> None:
    assert perplexity.compare(torch.zeros(1, 4), torch.ones(1, 4)).stderr is None
    with pytest.raises(ValueError, match="different tokens"):
        perplexity.compare(torch.zeros(1, 4), torch.zeros(1, 5))


def test_a_broken_model_has_infinite_perplexity() -> None:
    assert perplexity.summarise(torch.full((1, 2), 1e4)).perplexity == math.inf
