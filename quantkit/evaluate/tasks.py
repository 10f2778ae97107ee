"""Task accuracy through lm-evaluation-harness: original and packed on identical requests."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.data import hub
from quantkit.errors import QuantkitError, UsageError
from quantkit.evaluate import task_data
from quantkit.evaluate.scores import Answers

ALIASES: dict[str, tuple[str, ...]] = {"arc": ("arc_easy", "arc_challenge")}
"""Names that stand for several lm-eval tasks; every other name is lm-eval's own."""

FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "mmlu": "mmlu/default",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "gsm8k": "gsm8k",
}
"""Where lm-eval keeps the usual tasks: reading these folders takes 40 ms, its whole index 8 s."""


@dataclass(frozen=True)
class Selection:
    """Loaded tasks and how they are reported.

    `groups` maps each reported name (a task, or a group such as mmlu) to its tasks; `weighted` says
    which groups average over questions (lm-eval's `weight_by_size`) rather than over tasks.
    """

    tasks: dict[str, Any]
    groups: dict[str, list[str]]
    weighted: dict[str, bool]
    data: dict[str, str]
    notes: list[str]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's and datasets' own bars and log lines off the terminal."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(bar, disable=True)  # it has no switch for this one
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise QuantkitError(
            "--tasks needs lm-eval, which is not installed", "pip install lm-eval"
        ) from None


def expand(names: Sequence[str]) -> list[str]:
    """Replace aliases by lm-eval's names, keeping order, without duplicates."""
    return list(dict.fromkeys(t for name in names for t in ALIASES.get(name, (name,))))


def select(
    names: Sequence[str], folder: Path | None, work: Path, shots: int | None = None
) -> Selection:
    """Find tasks by name and load their data: from `folder` where it is there, else the Hub.

    Args:
        names: aliases, lm-eval tasks, groups or tags.
        folder: local task data (see `task_data.candidates` for the layout), or None.
        work: folder for the generated task descriptions; must live as long as the tasks.
        shots: examples before each question; None leaves each task's own number. A task that
            fixes it at zero (its prompt already holds examples, or none make sense) keeps zero.

    Raises:
        UsageError: a name nobody knows.
        QuantkitError: data that is neither local nor reachable.
    """
    _require()
    with _quiet():
        selection = _select(expand(names), folder, work)
        for task in selection.tasks.values():
            own = task.get_config("num_fewshot")
            if own != 0:
                task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    return selection


def _select(names: list[str], folder: Path | None, work: Path) -> Selection:
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    if all(name in FOLDERS for name in names):
        paths = [root / f for f in dict.fromkeys(FOLDERS[n] for n in names)]
        manager = TaskManager(include_defaults=False, include_path=list(paths))
    else:
        manager = TaskManager()
    index = manager.task_index
    for name in names:
        if name not in index:
            close = difflib.get_close_matches(name, [*ALIASES, *index], 3)
            hint = f"did you mean {', '.join(close)}?" if close else None
            raise UsageError(f"no such task: {name}", hint)

    groups: dict[str, list[str]] = {}
    weighted: dict[str, bool] = {}
    specs: dict[str, str] = {}
    data: dict[str, str] = {}
    notes: list[str] = []
    for name in names:
        leaves = list(_leaves(index, name, ()))
        local = {
            leaf: found
            for leaf, parents in leaves
            if (found := _local(index[leaf], leaf, parents, folder, work)) is not None
        }
        if local and len(local) < len(leaves):
            notes.append(f"{name}: {len(local)} of {len(leaves)} tasks have data in {folder}")
            leaves = [pair for pair in leaves if pair[0] in local]
        for leaf, _ in leaves:
            specs[leaf] = str(local[leaf][0]) if leaf in local else leaf
            hub = (index[leaf].cfg or {}).get("dataset_path")
            data[leaf] = f"local {local[leaf][1]}" if leaf in local else f"Hub {hub}"
        groups[name] = [leaf for leaf, _ in leaves]
        aggregate = (index[name].cfg or {}).get("aggregate_metric_list") or []
        weighted[name] = all(a.get("weight_by_size", True) for a in aggregate)
    tasks = {leaf: _load(manager, leaf, spec, data[leaf]) for leaf, spec in specs.items()}
    return Selection(tasks, groups, weighted, data, notes)


def _leaves(
    index: Mapping[str, Any], name: str, parents: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Tasks under a name, each with the groups and tags it was reached through."""
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name == "TAG":
        for child in sorted(entry.tags):
            yield from _leaves(index, child, (*parents, name))
    elif entry.kind.name == "GROUP":
        for child in (entry.cfg or {}).get("task") or []:
            if not isinstance(child, str):
                raise UsageError(
                    f"the group {name} changes its tasks in place; name the tasks themselves"
                )
            yield from _leaves(index, child, (*parents, name))
    else:
        alias = tuple(a for a, members in ALIASES.items() if name in members)
        yield name, parents + alias


def _local(
    entry: Any, leaf: str, parents: Sequence[str], folder: Path | None, work: Path
) -> tuple[Path, Path] | None:
    """A generated task description that reads local data, and the folder it reads."""
    if folder is None or entry.yaml_path is None or entry.kind.name != "TASK":
        return None
    config = entry.cfg or {}
    places = task_data.candidates(folder, leaf, parents, config)
    place, files = next(
        ((p, found) for p in places if (found := task_data.split_files(p))), (folder, {})
    )
    if files and "subject" in task_data.columns(files):
        files = {}  # a group's flat files: only the rows of this task's subject are meant
    if not files:
        subject = config.get("dataset_name")
        files = task_data.subject_rows(folder, parents, subject, work)
        if not files:
            return None
    import yaml

    described = task_data.override(leaf, entry.yaml_path, config, files)
    path = work / f"{leaf}.yaml"
    path.write_text(yaml.safe_dump(described))
    return path, place


def _load(manager: Any, leaf: str, spec: str, data: str) -> Any:
    import datasets

    # Without a network the Hub's libraries would try for minutes.
    cut_off = data.startswith("Hub") and not hub.reachable()
    try:
        with hub.offline(datasets, cut_off):
            return manager.load([spec])["tasks"][leaf]
    except Exception as error:
        if not data.startswith("Hub"):
            raise QuantkitError(
                f"the {data} does not fit the task {leaf}: {_line(error)}",
                "its columns must be those of the Hub data set",
            ) from error
        raise QuantkitError(
            f"no data for the task {leaf}: not in the local cache, and the Hub gave none "
            f"({_line(error)})",
            f"--tasks-dir DIR with DIR/{leaf}/test.jsonl (or .parquet) in the Hub's columns",
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def answer(
    model: Any,
    selection: Selection,
    *,
    limit: int | None,
    chat_template: bool,
    seed: int,
) -> Answers:
    """Ask one model (see `lm.recorded_model`) every question of the selected tasks.

    Prompts depend on the selection, the template and `seed` alone, so two models with one
    tokenizer get identical requests; `Answers.prompts` proves it.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate

        for task in selection.tasks.values():
            task.set_fewshot_seed(seed=seed)
        result = evaluate(
            lm=model,
            task_dict={"tasks": selection.tasks, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    values: dict[str, dict[str, list[float]]] = {}
    choices: dict[str, list[int]] = {}
    prompts: dict[str, list[str]] = {}
    for name, samples in result["samples"].items():
        ordered = sorted(samples, key=lambda s: (s["filter"], s["doc_id"]))
        for sample in ordered:
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], bool | int | float):
                    column = values.setdefault(name, {})
                    column.setdefault(f"{metric},{sample['filter']}", []).append(float(value))
        first = [s for s in ordered if s["filter"] == ordered[0]["filter"]]
        prompts[name] = [s["prompt_hash"] for s in first]
        if selection.tasks[name].OUTPUT_TYPE == "multiple_choice":
            choices[name] = [_best(s["filtered_resps"]) for s in first]
    return Answers(values, choices, prompts, model.earlier, sorted(model.batches))


def _best(responses: Sequence[Any]) -> int:
    scores = [float(r[0]) for r in responses]
    return scores.index(max(scores))


@contextmanager
def working_folder() -> Iterator[Path]:
    """A temporary folder for generated task descriptions."""
    with tempfile.TemporaryDirectory(prefix="quantkit-tasks-") as folder:
        yield Path(folder)


def describe(selection: Selection) -> dict[str, Any]:
    """Shots, metric version and origin of the data per task, for the report."""
    return {
        name: {
            "shots": task.get_config("num_fewshot"),
            "version": str(json.loads(json.dumps(task.VERSION, default=str))),
            "data": selection.data[name],
        }
        for name, task in selection.tasks.items()
    }
