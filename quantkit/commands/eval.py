"""`quantkit eval`: what quantization cost, on text and on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit import console
from quantkit.commands.common import Checkpoint, Json, Quiet, Restart, show

EXAMPLES = (
    ("quantkit eval", "perplexity on the shipped sample text"),
    ("quantkit eval model-osc --data wikitext", "on the test split of wikitext"),
    ("quantkit eval --tasks arc,mmlu --limit 200", "accuracy on 200 questions of each task"),
    ("quantkit eval --fail-under 95", "exit code 4 when less than 95 % is left"),
)


def run(
    checkpoint: Checkpoint = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: as for calibrate; its test split where it has one. "
            "Default: the held-out part of `sample`, unless --tasks is given.",
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window of text.", show_default="1024")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: arc, mmlu, hellaswag, piqa, winogrande, gsm8k, or any lm-eval "
            "task.",
            show_default=False,
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(
            help="Local task data, one folder a task (arc_easy/test.jsonl, mmlu/test.parquet) "
            "in the Hub's columns. Default: $QUANTKIT_TASKS_DIR, then ./tasks.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most so many windows of text, and questions per task.",
            show_default="16 windows, all questions",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0, help="Examples before each question.", show_default="each task's own number"
        ),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask through the model's chat template.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences per forward pass of a task.", show_default="automatic"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="The unquantized original to compare with. Default: found in the manifest.",
            show_default=False,
        ),
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(
            help="Exit with code 4 when less than this percentage of the original is left: of the "
            "next-token probability on text, of the mean score on tasks.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="For windows of text and examples of tasks.")] = 0,
    restart: Restart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be evaluated; run nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a checkpoint beside its unquantized original: perplexity, tasks, bits, kernels."""
    from quantkit.evaluate import run as stage
    from quantkit.evaluate import tables

    show(json, quiet)
    text = None
    if data is not None or tasks is None:
        text = stage.Text(data or "sample", limit or 16, seq_len)
    questions = None
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        questions = stage.Questions(names, tasks_dir, limit, shots, chat_template, batch_size)
    plan = stage.prepare(
        checkpoint,
        source=source,
        text=text,
        questions=questions,
        device=device,
        seed=seed,
        restart=restart,
    )
    if dry_run:
        what = stage.dry_run(plan)
        console.result(what, tables.dry_run_text(what), what["checkpoint"])
        return
    report = stage.evaluate(plan)
    console.result(report, tables.as_text(report), report["checkpoint"])
    stage.gate(report, fail_under)
