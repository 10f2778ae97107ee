"""Scores of two models on the same questions, and the drop with its own standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantkit.errors import QuantkitError

PREFERRED = ("acc_norm", "acc", "exact_match")
"""The metric shown for a task is the first of these it has; the JSON holds all of them."""


@dataclass(frozen=True)
class Answers:
    """What one model answered: metric values and choices per task and question, in order."""

    values: dict[str, dict[str, list[float]]]  # task -> "metric,filter" -> one per question
    choices: dict[str, list[int]]  # task -> chosen option (multiple choice only)
    prompts: dict[str, list[str]]  # task -> digest of each prompt
    earlier: int  # requests answered from the log
    batches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """A mean in percent (or a difference in points) and its standard error."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.stderr is None else f" ± {self.stderr:.2f}")


@dataclass(frozen=True)
class Row:
    """One task or group: the scores, and what the packed model lost (positive: lost)."""

    task: str
    metric: str
    questions: int
    packed: Score
    original: Score | None = None
    drop: Score | None = None


def side_by_side(
    groups: Mapping[str, Sequence[str]],
    weighted: Mapping[str, bool],
    original: Answers | None,
    packed: Answers,
) -> list[Row]:
    """One row per reported name, and their mean when there are several.

    The drop's standard error comes from the differences per question: both models answered the
    same ones, so most of what spreads the two scores cancels.

    Args:
        groups: reported name -> its tasks.
        weighted: whether a group averages over questions (else over its tasks).
    """
    if original is not None and original.prompts != packed.prompts:
        raise QuantkitError("the two models were not asked the same questions")
    rows = [_row(name, tasks, weighted[name], original, packed) for name, tasks in groups.items()]
    return [*rows, _mean(rows)] if len(rows) > 1 else rows


def metrics(tasks: Sequence[str], answers: Answers) -> list[str]:
    """The "metric,filter" names all of `tasks` have, the one to show first."""
    common = [m for m in answers.values[tasks[0]] if all(m in answers.values[t] for t in tasks)]
    return sorted(common, key=lambda m: (_rank(m), m))


def _rank(metric: str) -> int:
    plain, _, chosen = metric.partition(",")
    rank = PREFERRED.index(plain) if plain in PREFERRED else len(PREFERRED)
    return 2 * rank + (chosen == "strict-match")  # gsm8k: the lenient reading of the answer


def _row(
    name: str, tasks: Sequence[str], weighted: bool, original: Answers | None, packed: Answers
) -> Row:
    names = metrics(tasks, packed)
    if not names:
        raise QuantkitError(f"{name}: its tasks share no metric that is a number per question")
    metric = names[0]
    after = [packed.values[t][metric] for t in tasks]
    questions = sum(len(column) for column in after)
    if original is None:
        return Row(name, metric, questions, score(after, weighted))
    before = [original.values[t][metric] for t in tasks]
    lost = [[b - a for b, a in zip(x, y, strict=True)] for x, y in zip(before, after, strict=True)]
    return Row(
        name,
        metric,
        questions,
        score(after, weighted),
        score(before, weighted),
        score(lost, weighted),
    )


def score(columns: Sequence[Sequence[float]], weighted: bool) -> Score:
    """Mean over all questions, or over the tasks' means; values 0..1 become percent."""
    if weighted:
        columns = [[value for column in columns for value in column]]
    parts = [_moments(column) for column in columns]
    return _average([Score(100 * m, None if e is None else 100 * e) for m, e in parts])


def _moments(values: Sequence[float]) -> tuple[float, float | None]:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _average(parts: Sequence[Score]) -> Score:
    """Mean of independent scores; its error is unknown when one of theirs is."""
    errors = [p.stderr for p in parts if p.stderr is not None]
    known = len(errors) == len(parts)
    return Score(
        sum(p.value for p in parts) / len(parts),
        math.sqrt(sum(e * e for e in errors)) / len(parts) if known else None,
    )


def _mean(rows: Sequence[Row]) -> Row:
    originals = [r.original for r in rows if r.original is not None]
    drops = [r.drop for r in rows if r.drop is not None]
    return Row(
        "mean",
        "",
        sum(r.questions for r in rows),
        _average([r.packed for r in rows]),
        _average(originals) if originals else None,
        _average(drops) if drops else None,
    )
