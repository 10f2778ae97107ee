"""`eval` on a packed checkpoint and its original: numbers, cache, gate, and what it says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.data.tokens import load_tokens
from quantkit.errors import BelowGate, UsageError
from quantkit.evaluate import run
from quantkit.evaluate.perplexity import compare, negative_log_likelihood
from quantkit.runtime.load import load
from tests.evaluate.local_tasks import directly
from tests.workspace import Shell, Workspace

TEXT = run.Text("sample", 3, 48)


def report_of(checkpoint: str, **options: object) -> dict[str, object]:
    asked = {"text": TEXT, "device": "cpu", **options}
    return run.evaluate(run.prepare(checkpoint, **asked))  # type: ignore[arg-type]


def test_numbers_are_those_of_the_two_models(workspace: Workspace) -> None:
    report = report_of("model-osc")
    ids = load_tokens("sample", Path("model"), samples=3, seq_len=48, held_out=True).ids
    before = negative_log_likelihood(load("model"), ids)
    after = negative_log_likelihood(load("model-osc"), ids)
    excess = compare(before, after)
    part = report["perplexity"]
    assert isinstance(part, dict)
    assert part["original"]["nll"] == pytest.approx(float(before.double().mean()), abs=1e-6)
    assert part["packed"]["nll"] == pytest.approx(float(after.double().mean()), abs=1e-6)
    assert part["packed"]["perplexity"] == pytest.approx(math.exp(part["packed"]["nll"]))
    assert part["excess_nll"] == pytest.approx(excess.mean, abs=1e-6)
    assert part["excess_nll_stderr"] == pytest.approx(excess.stderr, rel=1e-3)
    assert part["tokens"] == 3 * 47
    assert report["original"] == str(Path("model").resolve())
    assert report["kernels"] == {"reference": 8}


def test_bits_count_what_lies_on_disk(workspace: Workspace) -> None:
    report = report_of("model-osc")
    checkpoint = open_checkpoint("model-osc")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    stored = sum(
        info.nbytes for n, info in checkpoint.tensors.items() if any(f".{p}." in n for p in names)
    )
    weights = sum(
        info.shape[0] * info.shape[1]
        for n, info in open_checkpoint("model").tensors.items()
        if any(f".{p}." in n for p in names)
    )
    assert report["bits_per_weight"] == pytest.approx(8 * stored / weights, abs=1e-3)


def test_the_held_out_part_of_the_sample_is_not_calibrated(workspace: Workspace) -> None:
    folder = Path(run.__file__).parent.parent / "data" / "sample"
    train, test = (
        [text.read_text(encoding="utf-8") for text in sorted((folder / part).glob("*.txt"))]
        for part in ("train", "test")
    )
    paragraphs = {p for text in test for p in text.split("\n\n") if len(p) > 200}
    calibrated = "\n\n".join(train)
    assert len(paragraphs) > 50
    assert not [p for p in paragraphs if p in calibrated]


def test_losses_are_kept_by_checkpoint_and_text(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report_of("model-osc")
    monkeypatch.setattr("quantkit.runtime.load.load", lambda *_, **__: pytest.fail("loaded"))
    assert report_of("model-osc")["perplexity"] == first["perplexity"]
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        report_of("model-osc", text=run.Text("sample", 2, 48))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        report_of("model-osc", restart=True)


def test_other_weights_under_the_same_name_are_computed_anew(workspace: Workspace) -> None:
    from quantkit.checkpoint.step import Target
    from quantkit.pack.job import PackOptions
    from quantkit.pack.pack import pack

    first = report_of("model-osc")
    pack("model-calibrated", PackOptions("mxfp4"), Target(Path("model-osc"), overwrite=True))
    assert report_of("model-osc")["perplexity"] != first["perplexity"]


def test_without_its_original_it_is_evaluated_alone(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("model")
    shutil.rmtree("model-calibrated")
    report = report_of("model-osc")
    assert report["original"] is None
    part = report["perplexity"]
    assert isinstance(part, dict)
    assert "original" not in part
    assert "excess_nll" not in part
    assert "evaluated alone" in capsys.readouterr().err
    with pytest.raises(UsageError, match="there is none"):
        run.gate(report, 50)


def test_the_gate_is_what_is_left_of_the_original() -> None:
    report = {"retained": {"text": 93.0, "tasks": 99.0}}
    run.gate(report, None)
    run.gate(report, 93)
    with pytest.raises(BelowGate, match=r"93\.00 % of the original is left \(text\), below 94 %"):
        run.gate(report, 94)


def test_retained_text_is_the_ratio_of_perplexities(workspace: Workspace) -> None:
    report = report_of("model-osc")
    part, retained = report["perplexity"], report["retained"]
    assert isinstance(part, dict)
    assert isinstance(retained, dict)
    ratio = 100 * part["original"]["perplexity"] / part["packed"]["perplexity"]
    assert retained["text"] == pytest.approx(ratio, rel=1e-6)


def test_text_that_was_calibrated_on_is_said(workspace: Workspace, shell: Shell) -> None:
    Path("text.txt").write_text("Ducks are birds of many waters. " * 400)
    shell(
        "calibrate", "model", "--data", "text.txt", "--samples", "4", "--seq-len", "32", "-o", "c"
    )
    shell("pack", "c", "--scheme", "mxfp4", "-o", "p")
    leaked = shell("eval", "p", "--data", "text.txt", "--limit", "1", "--seq-len", "32")
    assert "warning: text.txt was calibrated on too" in leaked.err
    clean = shell("eval", "p", "--data", "sample", "--limit", "1", "--seq-len", "32")
    assert "calibrated on too" not in clean.err


def test_packed_choices_are_those_of_lm_eval_on_the_loaded_model(
    workspace: Workspace, shell: Shell
) -> None:
    pytest.importorskip("lm_eval")
    from quantkit.evaluate import tasks

    done = shell("eval", "model-osc", "--tasks", "arc_easy", "--json")
    assert done.code == 0, done.err
    ours = json.loads(done.out)["tasks"]
    selection = tasks.select(["arc_easy"], Path("tasks"), workspace.path)
    for name, choices in (("model-osc", "packed"), ("model", "original")):
        direct = directly(load(name), selection)
        samples = sorted(direct["arc_easy"], key=lambda s: s["doc_id"])
        scores = [[r[0] for r in s["filtered_resps"]] for s in samples]
        assert ours["choices"][choices]["arc_easy"] == [s.index(max(s)) for s in scores]
    again = json.loads(shell("eval", "model-osc", "--tasks", "arc_easy", "--json").out)["tasks"]
    assert again["answered_earlier"] == [24, 24]
    assert again["rows"] == ours["rows"]
