"""Task data without a network: ARC-shaped questions, and the MMLU questions of lm-eval's wheel."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from examples.offline_tasks import mmlu_questions


def write_arc(folder: Path, questions: int = 12, seed: int = 0) -> Path:
    """Write `arc_easy/` and `arc_challenge/` in the schema of the Hub data set."""
    rng = random.Random(seed)
    for task in ("arc_easy", "arc_challenge"):
        for split, count in (("train", 4), ("validation", 2), ("test", questions)):
            rows = [_sum(rng, f"{task}-{split}-{i}", task == "arc_challenge") for i in range(count)]
            _write(folder / task / f"{split}.jsonl", rows)
    return folder


def _sum(rng: random.Random, name: str, hard: bool) -> dict[str, Any]:
    a, b = rng.randrange(2, 90 if hard else 9), rng.randrange(2, 9)
    options = [a + b, a + b + 1, a * b + 7, abs(a - b)]
    order = rng.sample(range(4), 4)
    return {
        "id": name,
        "question": f"A farmer has {a} sheep and buys {b} more. How many sheep are there?",
        "choices": {
            "text": [f"{options[i]} sheep" for i in order],
            "label": ["A", "B", "C", "D"],
        },
        "answerKey": "ABCD"[order.index(0)],
    }


def write_mmlu(folder: Path, per_subject: int = 2, subjects: int = 3) -> Path:
    """Write `mmlu/` as one flat file per split with a `subject` column, as the Hub's `all`."""
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for question in mmlu_questions():
        by_subject.setdefault(question["subject"], []).append(question)
    chosen = sorted(s for s, rows in by_subject.items() if len(rows) > per_subject)[:subjects]
    rows = [row for s in chosen for row in by_subject[s]]
    cut = {s: by_subject[s][:per_subject] for s in chosen}
    _write(folder / "mmlu" / "test.jsonl", [row for part in cut.values() for row in part])
    _write(folder / "mmlu" / "dev.jsonl", [row for row in rows if row not in cut[row["subject"]]])
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def directly(model: Any, selection: Any) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's own samples by task: its harness and its model class, nothing of ours between."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from tests.tiny import tiny_tokenizer

    for task in selection.tasks.values():
        task.set_fewshot_seed(seed=1234)
    loaded = {"tasks": selection.tasks, "groups": {}, "group_map": {}}
    lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=1)
    samples: dict[str, list[dict[str, Any]]] = evaluate(lm, loaded, bootstrap_iters=0)["samples"]
    return samples
