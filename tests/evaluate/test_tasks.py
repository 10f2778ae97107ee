"""Tasks without a network, against lm-eval called directly, and continued after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from examples.offline_tasks import mmlu_questions
from quantkit.data import hub
from quantkit.errors import QuantkitError, UsageError
from quantkit.evaluate import lm, scores, task_data, tasks
from quantkit.evaluate.request_log import RequestLog
from tests.evaluate.local_tasks import directly, write_arc, write_mmlu
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmlu(write_arc(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(max_position_embeddings=1024)


def ask(
    model: Any, selection: tasks.Selection, log: Path, limit: int | None = None
) -> scores.Answers:
    with RequestLog(log) as answered:
        wrapped = lm.recorded_model(lambda: model, tiny_tokenizer(), answered, None, "test")
        return tasks.answer(wrapped, selection, limit=limit, chat_template=False, seed=1234)


def test_choices_are_those_of_lm_eval_called_directly(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    selection = tasks.select(["arc", "mmlu"], folder, tmp_path)
    ours = ask(model, selection, tmp_path / "log.jsonl")
    again = tasks.select(["arc", "mmlu"], folder, tmp_path)
    direct = directly(model, again)
    assert set(ours.choices) == set(direct)
    for task, samples in direct.items():
        theirs = sorted(samples, key=lambda s: s["doc_id"])
        assert ours.prompts[task] == [s["prompt_hash"] for s in theirs]
        chosen = [max(range(4), key=lambda c: s["filtered_resps"][c][0]) for s in theirs]
        assert ours.choices[task] == chosen
        assert ours.values[task]["acc,none"] == [s["acc"] for s in theirs]
    assert len(ours.choices["arc_easy"]) == 12
    assert len(set(ours.choices["arc_easy"])) > 1


def test_mmlu_is_the_subjects_that_are_there(folder: Path, tmp_path: Path) -> None:
    selection = tasks.select(["mmlu"], folder, tmp_path)
    assert list(selection.groups) == ["mmlu"]
    assert len(selection.groups["mmlu"]) == 3
    assert all(name.startswith("mmlu_") for name in selection.tasks)
    assert "3 of 57" in selection.notes[0]
    assert all(len(t.eval_docs) == 2 for t in selection.tasks.values())


def test_the_wheel_gives_real_mmlu_questions() -> None:
    questions = mmlu_questions()
    assert len(questions) > 200
    assert all(len(q["choices"]) == 4 and all(q["choices"]) for q in questions)


def test_identical_models_drop_nothing_with_no_error(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    selection = tasks.select(["arc_easy", "arc_challenge"], folder, tmp_path)
    first = ask(model, selection, tmp_path / "a.jsonl")
    second = ask(model, selection, tmp_path / "b.jsonl")
    rows = scores.side_by_side(selection.groups, selection.weighted, first, second)
    assert [r.task for r in rows] == ["arc_easy", "arc_challenge", "mean"]
    for row in rows:
        assert row.drop is not None
        assert row.drop.value == 0
        assert row.drop.stderr == 0  # paired: two separate errors would not cancel
        assert row.packed.stderr is None or row.packed.stderr >= 0


def test_answered_requests_are_not_computed_again(folder: Path, model: Any, tmp_path: Path) -> None:
    selection = tasks.select(["arc_easy"], folder, tmp_path)
    log = tmp_path / "log.jsonl"
    first = ask(model, selection, log)
    assert first.earlier == 0
    second = ask(None, selection, log)  # the model would fail if it were needed
    assert second.earlier == 48
    assert second.choices == first.choices
    half = log.read_bytes()
    log.write_bytes(half[: len(half) // 2])  # as a kill in the middle of a line leaves it
    third = ask(model, selection, log)
    assert 0 < third.earlier < 48
    assert third.choices == first.choices
    assert sorted(log.read_bytes().splitlines()) == sorted(half.splitlines())


def test_a_killed_run_keeps_what_it_answered(tmp_path: Path) -> None:
    write_arc(tmp_path / "tasks", questions=60)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from quantkit.evaluate import lm, tasks\n"
        "from tests.evaluate.test_tasks import ask\n"
        "from tests.tiny import tiny_model\n"
        "work = Path(sys.argv[1])\n"
        "selection = tasks.select(['arc_easy'], work / 'tasks', work)\n"
        "model = tiny_model(max_position_embeddings=1024)\n"
        "forward = model.forward\n"
        "model.forward = lambda *a, **k: (time.sleep(0.1), forward(*a, **k))[1]\n"
        "ask(model, selection, work / 'log.jsonl')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    log, end = tmp_path / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < end and not (log.exists() and log.stat().st_size > 0):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(log.read_text().splitlines())
    assert 0 < kept < 240
    selection = tasks.select(["arc_easy"], tmp_path / "tasks", tmp_path)
    model = tiny_model(max_position_embeddings=1024)
    continued = ask(model, selection, log)
    whole = ask(model, selection, tmp_path / "fresh.jsonl")
    assert continued.earlier >= kept - 1  # the last line may have been torn
    assert continued.choices == whole.choices


def test_limit_and_shots(folder: Path, model: Any, tmp_path: Path) -> None:
    selection = tasks.select(["arc_easy"], folder, tmp_path)
    plain = ask(model, selection, tmp_path / "a.jsonl", limit=5)
    selection = tasks.select(["arc_easy"], folder, tmp_path, shots=2)
    shots = ask(model, selection, tmp_path / "b.jsonl", limit=5)
    assert len(plain.choices["arc_easy"]) == 5
    assert plain.prompts != shots.prompts
    assert tasks.describe(selection)["arc_easy"]["shots"] == 2
    with pytest.raises(QuantkitError, match="same questions"):
        scores.side_by_side(selection.groups, selection.weighted, plain, shots)


def test_other_layouts_are_found(folder: Path, tmp_path: Path) -> None:
    import pandas

    rows = [json.loads(line) for line in (folder / "arc_easy/test.jsonl").read_text().splitlines()]
    hub = tmp_path / "data" / "ai2_arc" / "ARC-Easy"
    hub.mkdir(parents=True)
    pandas.DataFrame(rows).to_parquet(hub / "test-00000-of-00001.parquet")
    one = tmp_path / "data" / "arc_challenge"
    one.mkdir()
    (one / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    selection = tasks.select(["arc"], tmp_path / "data", tmp_path)
    for task in selection.tasks.values():
        assert [d["question"] for d in task.eval_docs] == [r["question"] for r in rows]


def test_wrong_names_and_wrong_data_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    arc = Path(lm_eval.__file__).parent / "tasks" / "arc"
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=[arc])
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)  # the whole index takes 8 s
    with pytest.raises(UsageError, match="no such task: arc_esy") as raised:
        tasks.select(["arc_esy"], folder, tmp_path)
    assert "arc_easy" in (raised.value.hint or "")
    bad = tmp_path / "bad" / "arc_easy"
    bad.mkdir(parents=True)
    (bad / "test.jsonl").write_text('{"text": "not a question"}\n')
    with pytest.raises(QuantkitError, match="does not fit the task arc_easy"):
        tasks.select(["arc_easy"], tmp_path / "bad", tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        task_data.default_folder(tmp_path / "missing")


def test_no_network_names_the_local_way_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(QuantkitError, match="no data for the task piqa") as raised:
        tasks.select(["piqa"], None, tmp_path)
    assert "--tasks-dir" in (raised.value.hint or "")


def test_the_lenient_answer_and_the_group_mean() -> None:
    values = {
        "a": {"exact_match,strict-match": [0.0, 0.0], "exact_match,flexible-extract": [1.0, 0.0]}
    }
    answers = scores.Answers(values, {}, {"a": ["x", "y"]}, 0)
    (row,) = scores.side_by_side({"a": ["a"]}, {"a": True}, None, answers)
    assert row.metric == "exact_match,flexible-extract"
    assert row.packed.value == 50
    sizes = {"p": {"acc,none": [1.0] * 3}, "q": {"acc,none": [0.0]}}
    group = scores.Answers(sizes, {}, {"p": [], "q": []}, 0)
    by_question, by_task = (
        scores.side_by_side({"g": ["p", "q"]}, {"g": weighted}, None, group)[0].packed.value
        for weighted in (True, False)
    )
    assert (by_question, by_task) == (75, 50)
