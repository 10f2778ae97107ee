"""`eval`: a checkpoint and its unquantized original, side by side on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import console
from quantkit.checkpoint.ancestry import origin
from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.step import open_source
from quantkit.data.tokens import TokenBatch, load_tokens
from quantkit.errors import BelowGate, UsageError
from quantkit.evaluate import lm, scores, task_data, tasks
from quantkit.evaluate.models import Subject, choose_device
from quantkit.evaluate.perplexity import compare, negative_log_likelihood, summarise
from quantkit.evaluate.request_log import RequestLog


@dataclass(frozen=True)
class Text:
    """Text to measure perplexity on: `--data`, windows and their length."""

    data: str = "sample"
    windows: int | None = 16
    seq_len: int | None = None


@dataclass(frozen=True)
class Questions:
    """Tasks to run: `--tasks` and how to ask them."""

    names: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat_template: bool = False
    batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything an evaluation will do, found out before any model is loaded."""

    subject: Subject
    original: Subject | None
    tokens: TokenBatch | None
    questions: Questions | None
    seed: int
    restart: bool


def prepare(
    checkpoint: str | Path | None,
    *,
    source: str | None = None,
    text: Text | None = None,
    questions: Questions | None = None,
    device: str = "auto",
    seed: int = 0,
    restart: bool = False,
) -> Plan:
    """Open the checkpoint, find its original and read the text.

    Args:
        source: the unquantized original; None finds it through the manifest, and without one the
            checkpoint is evaluated alone (a note says so).
        text, questions: what to measure; with neither, perplexity of the shipped sample text.
        restart: forget answers of earlier runs.
    """
    opened = open_source(checkpoint)
    device = choose_device(device)
    original = open_source(source) if source else origin(opened)
    if original is None:
        console.note(
            f"no original of {opened.path} is here: it is evaluated alone (--source names one)"
        )
    if text is None and questions is None:
        text = Text()
    tokens = None
    if text is not None:
        tokens = load_tokens(
            text.data,
            opened.path,
            samples=text.windows,
            seq_len=text.seq_len,
            seed=seed,
            held_out=True,
        )
        console.note(f"text: {tokens.description}")
        _warn_of_leak(opened, text.data)
    return Plan(
        Subject(opened, device),
        Subject(original, device) if original else None,
        tokens,
        questions,
        seed,
        restart,
    )


def _warn_of_leak(checkpoint: Checkpoint, data: str) -> None:
    step = checkpoint.manifest.last("calibrate") if checkpoint.manifest else None
    # The shipped sample and the Hub's data sets have a held-out part; a file is the same file.
    if step and step.options.get("data") == data and Path(data.partition(":")[0]).is_file():
        console.warn(f"{data} was calibrated on too: the loss on it is flattered")


def dry_run(plan: Plan) -> dict[str, Any]:
    """What `evaluate` would do: work, bytes read, memory; no model is loaded."""
    found: dict[str, Any] = {
        "checkpoint": str(plan.subject.path),
        "original": str(plan.original.path) if plan.original else None,
        "device": plan.subject.device,
        "scheme": scheme_name(plan.subject.checkpoint),
    }
    subjects = [s for s in (plan.original, plan.subject) if s is not None]
    if plan.tokens is not None:
        todo = [s for s in subjects if plan.restart or not _losses_file(s, plan.tokens).exists()]
        found["text"] = plan.tokens.description
        found["tokens"] = plan.tokens.ids.numel() * len(todo)
        if (seconds := _seconds(plan, todo)) is not None:
            found["seconds"] = seconds
    if plan.questions is not None:
        asked = plan.questions
        with tasks.working_folder() as work:
            chosen = tasks.select(asked.names, task_data.default_folder(asked.folder), work)
            sizes = {name: len(task.eval_docs) for name, task in chosen.tasks.items()}
        limit = asked.limit or max(sizes.values())
        found["questions"] = {name: min(size, limit) for name, size in sizes.items()}
        found["data"] = chosen.data
    found["bytes_read"] = sum(inspect(s.checkpoint)["bytes"] for s in subjects)
    length = plan.tokens.ids.shape[1] if plan.tokens is not None else lm.CPU_TOKENS
    found["peak_memory_bytes"] = max(_memory(s, length) for s in subjects)
    return found


def _seconds(plan: Plan, todo: Sequence[Subject]) -> float | None:
    """Time of the text, from one window through the original's first block and head."""
    from quantkit.model.block import BlockRunner
    from quantkit.model.families import describe
    from quantkit.model.timing import ROUNDED, pace

    plain = [s for s in (plan.original, plan.subject) if s is not None and not _is_packed(s)]
    if not plain or plan.tokens is None:
        return None
    source = plain[0].checkpoint
    layout = describe(source.config, source.tensors)
    measured = pace(BlockRunner(source, layout, device=plain[0].device), plan.tokens.ids[:1])
    whole = measured.whole(layout.n_layers) * len(plan.tokens.ids)
    return sum(whole * (ROUNDED if _is_packed(subject) else 1) for subject in todo)


def _is_packed(subject: Subject) -> bool:
    return "quantization_config" in subject.checkpoint.config


def _memory(subject: Subject, tokens: int) -> int:
    """Bytes a model needs at once: its files, the decoded weights of a packed one, the logits."""
    seen = inspect(subject.checkpoint)
    decoded = 2 * sum(s["weights"] for s in seen["sites"]) if _is_packed(subject) else 0
    logits = lm.LOGIT_BYTES * tokens * int(seen["shape"].get("vocab", 0))
    return int(seen["bytes"]) + decoded + logits


def evaluate(plan: Plan) -> dict[str, Any]:
    """Run a plan; the report as one JSON-ready object (see `as_text` for people)."""
    subjects = [s for s in (plan.original, plan.subject) if s is not None]
    with tasks.working_folder() as work:
        selection = None
        if plan.questions is not None:
            asked = plan.questions
            folder = task_data.default_folder(asked.folder)
            selection = tasks.select(asked.names, folder, work, asked.shots)
            for note in selection.notes:
                console.note(note)
        losses: list[torch.Tensor] = []
        answers: list[scores.Answers] = []
        kernels: dict[str, int] = {}
        for subject in subjects:
            if plan.tokens is not None:
                losses.append(_losses(subject, plan.tokens, plan.restart))
            if selection is not None and plan.questions is not None:
                answers.append(_answers(subject, selection, plan))
            kernels = subject.kernels()
            subject.release()
    report = _describe(plan, kernels)
    if plan.tokens is not None:
        report["perplexity"] = _perplexity(plan.tokens, losses)
    if selection is not None and plan.questions is not None:
        report["tasks"] = _tasks(plan.questions, selection, answers)
    report["retained"] = _retained(report)
    return report


def _losses(subject: Subject, tokens: TokenBatch, restart: bool) -> torch.Tensor:
    """Losses [windows, seq - 1] of a subject; those of earlier runs on these tokens are kept."""
    from safetensors.torch import load_file, save_file

    file = _losses_file(subject, tokens)
    if file.exists() and not restart:
        return load_file(file)["nll"]
    with console.progress(f"perplexity of {subject.path.name}", len(tokens.ids)) as progress:
        nll = negative_log_likelihood(subject.model(), tokens.ids, progress=progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    save_file({"nll": nll}, temporary)
    temporary.replace(file)
    return nll


def _losses_file(subject: Subject, tokens: TokenBatch) -> Path:
    return subject.cache(f"nll-{tokens.digest[:32]}.safetensors")


def _answers(subject: Subject, selection: tasks.Selection, plan: Plan) -> scores.Answers:
    from transformers import AutoTokenizer

    assert plan.questions is not None
    tokenizer = AutoTokenizer.from_pretrained(
        subject.path, local_files_only=True, trust_remote_code=False
    )
    if plan.questions.chat_template and tokenizer.chat_template is None:
        raise UsageError(f"{subject.path} has no chat template")
    log = subject.cache("answers.jsonl")
    if plan.restart:
        log.unlink(missing_ok=True)
    with RequestLog(log) as answered:
        name, batch = subject.path.name, plan.questions.batch
        model = lm.recorded_model(subject.model, tokenizer, answered, batch, name)
        return tasks.answer(
            model,
            selection,
            limit=plan.questions.limit,
            chat_template=plan.questions.chat_template,
            seed=plan.seed,
        )


def _describe(plan: Plan, kernels: dict[str, int]) -> dict[str, Any]:
    from quantkit.checkpoint.step import versions

    seen = inspect(plan.subject.checkpoint)
    report: dict[str, Any] = {
        "checkpoint": str(plan.subject.path),
        "original": str(plan.original.path) if plan.original else None,
        "device": plan.subject.device,
        "scheme": scheme_name(plan.subject.checkpoint),
        "formats": {s["site"]: s["format"] for s in seen["sites"]},
        "bits_per_weight": seen["bits_per_weight"],
        "bits_per_parameter": seen["bits_per_parameter"],
        "kernels": kernels,
        "seed": plan.seed,
        "versions": versions(),
    }
    if plan.original is not None:
        before = inspect(plan.original.checkpoint)
        report["original_bits_per_weight"] = before["bits_per_weight"]
    return report


def scheme_name(checkpoint: Checkpoint) -> str:
    """The scheme a packed checkpoint records, else the type of its numbers."""
    data = checkpoint.config.get("quantization_config")
    if isinstance(data, dict):
        return str(data.get("scheme") or data.get("format") or data.get("quant_method"))
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return "not quantized" if dtype is None else f"not quantized ({dtype})"


def _perplexity(tokens: TokenBatch, losses: list[torch.Tensor]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "data": tokens.description,
        "digest": tokens.digest,
        "windows": tokens.ids.shape[0],
        "seq_len": tokens.ids.shape[1],
        "tokens": losses[-1].numel(),
        "special_tokens": "none added",
        "packed": summarise(losses[-1]).as_dict(),
    }
    if len(losses) == 2:
        excess = compare(*losses)
        report["original"] = summarise(losses[0]).as_dict()
        report["excess_nll"], report["excess_nll_stderr"] = excess.mean, excess.stderr
    return report


def _tasks(
    asked: Questions, selection: tasks.Selection, answers: list[scores.Answers]
) -> dict[str, Any]:
    from importlib.metadata import version

    packed, original = answers[-1], answers[0] if len(answers) == 2 else None
    rows = scores.side_by_side(selection.groups, selection.weighted, original, packed)
    each = {name: [name] for name in selection.tasks}
    weighted = dict.fromkeys(each, True)
    parts = scores.side_by_side(each, weighted, original, packed)
    return {
        "lm_eval": version("lm_eval"),
        "limit": asked.limit,
        "chat_template": asked.chat_template,
        "batch": asked.batch or f"automatic {packed.batches}",
        "answered_earlier": [a.earlier for a in answers],
        "rows": [asdict(row) for row in rows],
        "parts": [asdict(row) for row in parts if row.task in each],
        "settings": tasks.describe(selection),
        "choices": {"packed": packed.choices, "original": original.choices if original else None},
    }


def _retained(report: dict[str, Any]) -> dict[str, float]:
    """What is left of the original, in percent: 100 is all of it.

    `text`: of the probability of the right next token, geometric mean (perplexity before over
    perplexity after). `tasks`: of the mean score.
    """
    found = {}
    if (excess := report.get("perplexity", {}).get("excess_nll")) is not None:
        found["text"] = 100 * math.exp(-excess)
    rows = report.get("tasks", {}).get("rows")
    if rows and rows[-1]["original"] and rows[-1]["original"]["value"] > 0:
        found["tasks"] = 100 * rows[-1]["packed"]["value"] / rows[-1]["original"]["value"]
    return found


def gate(report: dict[str, Any], percent: float | None) -> None:
    """Raise BelowGate (exit code 4) when less than `percent` of the original is left."""
    if percent is None:
        return
    if not report["retained"]:
        raise UsageError("--fail-under compares with the original, and there is none", "--source")
    what, least = min(report["retained"].items(), key=lambda item: item[1])
    if least < percent:
        raise BelowGate(f"{least:.2f} % of the original is left ({what}), below {percent:g} %")
