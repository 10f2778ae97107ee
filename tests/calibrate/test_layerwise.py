"""Calibration end to end on tiny models: what is measured, kept, continued and refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.calibrate.hidden import write_durably
from quantkit.calibrate.layerwise import Options, calibrate
from quantkit.calibrate.predict import predict
from quantkit.calibrate.store import FILE, load_statistics
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.step import Target
from quantkit.errors import InputRejected, UsageError
from tests.tiny import VOCAB, save_tiny

SAMPLES, SEQ = 24, 32


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Several batches, so that splitting over processes and spilling mean something.
    monkeypatch.setattr("quantkit.calibrate.layerwise.BATCH_TOKENS", {"cpu": 3 * SEQ})


def token_file(path: Path) -> str:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, VOCAB, (SAMPLES, SEQ), generator=generator)
    save_file({"ids": ids}, path)
    return f"{path}:ids"


def options(**changes: object) -> Options:
    spec = token_file(Path("tokens.safetensors"))
    return Options(**({"data": spec, "samples": SAMPLES, "device": "cpu"} | changes))


def site_inputs(path: Path) -> dict[str, torch.Tensor]:
    """What every nn.Linear of the blocks is fed by the whole model on the same tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found.setdefault(name, []).append(
                    inputs[0].flatten(0, -2)
                )
            )
    ids = load_file("tokens.safetensors")["ids"]
    with torch.no_grad():
        for batch in ids.split(3):
            model(batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_statistics_are_those_of_the_whole_model(family: str) -> None:
    source = save_tiny(Path("model"), family)
    result = calibrate(source, options(), Target())
    assert result is not None
    assert result.output.name == "model-calibrated"
    statistics = load_statistics(open_checkpoint(result.output))
    expected = site_inputs(source)
    for site in result.layout.sites:
        x = expected[site.linears[0].module]
        wide = x.double()
        assert int(statistics.get(site.key, "count")) == SAMPLES * SEQ
        assert torch.equal(statistics.get(site.key, "absmax"), x.abs().amax(0))
        torch.testing.assert_close(
            statistics.get(site.key, "energy"), (wide**2).sum(0), rtol=1e-6, atol=0
        )
        for q in (1.0, 0.999, 0.995):
            rank = round((1 - q) * (len(x) - 1))
            nearest = x.abs().sort(dim=0, descending=True).values[rank]
            assert torch.equal(statistics.quantile(site.key, q), nearest)
        centred = wide - wide.mean(0)
        kurtosis = (centred**4).mean(0) / (centred**2).mean(0) ** 2 - 3
        torch.testing.assert_close(statistics.kurtosis(site.key), kurtosis, rtol=1e-4, atol=1e-4)
        magnitude = x.abs()
        above = magnitude > 5 * float(magnitude.double().mean())
        groups = magnitude.split(32, dim=1)
        for g, part in enumerate(groups):
            passed = above[:, 32 * g : 32 * g + 32].any(1)
            hits = torch.bincount(part[passed].argmax(1), minlength=part.shape[1])
            density = float(hits.max() / passed.sum()) if bool(passed.any()) else float("nan")
            found = float(statistics.density(site.key, 32)[g])
            assert found == pytest.approx(density, nan_ok=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_output_is_the_same_checkpoint(family: str) -> None:
    """Plain transformers gives bit-equal logits; the weights are the same file."""
    from transformers import AutoModelForCausalLM

    source = save_tiny(Path("model"), family, torch.bfloat16)
    result = calibrate(source, options(), Target())
    assert result is not None
    ids = load_file("tokens.safetensors")["ids"][:2]
    logits = []
    for path in (source, result.output):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
    shard = "model.safetensors"
    assert (source / shard).stat().st_ino == (result.output / shard).stat().st_ino


@pytest.mark.parametrize("every_expert", [False, True])
def test_mixture(every_expert: bool) -> None:
    source = save_tiny(Path("model"), "qwen3_moe")
    result = calibrate(
        source, options(every_expert=every_expert, min_expert_tokens=10**6), Target()
    )
    assert result is not None
    statistics = result.statistics
    for layer in range(2):
        counts = [
            int(statistics.get(f"layers.{layer}.experts.{e}.mlp_out", "count")) for e in range(4)
        ]
        tokens = SAMPLES * SEQ
        assert sum(counts) == (4 if every_expert else 2) * tokens
        assert int(statistics.get(f"layers.{layer}.mlp_in", "count")) == tokens
    assert len(result.starved) == 8


def test_spilled_states_change_nothing() -> None:
    source = save_tiny(Path("model"), "llama")
    held = calibrate(source, options(), Target(output=Path("held")))
    spilled = calibrate(source, options(activation_memory=1), Target(output=Path("spilled")))
    assert held is not None
    assert spilled is not None
    assert (held.output / FILE).read_bytes() == (spilled.output / FILE).read_bytes()


def test_stale_and_missing_statistics_are_refused() -> None:
    source = save_tiny(Path("model"), "llama")
    with pytest.raises(InputRejected, match="no statistics") as caught:
        load_statistics(open_checkpoint(source))
    assert "quantkit calibrate" in (caught.value.hint or "")
    result = calibrate(source, options(), Target())
    assert result is not None
    other = save_tiny(Path("other"), "llama", seed=1)
    (other / FILE).write_bytes((result.output / FILE).read_bytes())
    with pytest.raises(InputRejected, match="other weights"):
        load_statistics(open_checkpoint(other))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_name_their_layer_and_leave_nothing(bad: float) -> None:
    source = save_tiny(Path("model"), "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = bad
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputRejected, match=r"layers\.1\.mlp\.up_proj"):
        calibrate(source, options(), Target())
    assert not Path("model-calibrated").exists()


def test_activations_that_overflow_name_their_site() -> None:
    source = save_tiny(Path("model"), "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e20
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputRejected, match=r"layers\.1\.mlp_out"):
        calibrate(source, options(), Target())
    assert not Path("model-calibrated").exists()


def test_full_disk_is_an_error_that_can_be_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(Path("model"), "llama", num_hidden_layers=4)
    whole = calibrate(source, options(), Target(output=Path("whole")))
    assert whole is not None
    written = []

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_durably(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("quantkit.calibrate.layerwise.write_durably", full)
        with pytest.raises(OSError, match="No space"):
            calibrate(source, options(), Target(output=Path("out")))
    assert not Path("out").exists()
    result = calibrate(source, options(), Target(output=Path("out")))
    assert result is not None
    assert (result.output / FILE).read_bytes() == (whole.output / FILE).read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gpu_measures_what_the_cpu_measures(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "quantkit.calibrate.layerwise.BATCH_TOKENS", {"cpu": 3 * SEQ, "cuda": 3 * SEQ}
    )
    source = save_tiny(Path("model"), family)
    found = []
    for device in ("cpu", "cuda"):
        target = Target(output=Path(device))
        result = calibrate(source, options(device=device, every_expert=True), target)
        assert result is not None
        found.append(load_file(result.output / FILE))
    for name, tensor in found[0].items():
        if tensor.dtype == torch.int64:
            near = (tensor - found[1][name]).abs().max() <= 2  # a value beside the threshold
            assert bool(near), name
        else:
            scale = float(tensor.abs().max())
            torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-3 * scale)


def test_refusals() -> None:
    source = save_tiny(Path("model"), "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(InputRejected, match="quantized already"):
        calibrate(source, options(), Target())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="--device"):
        calibrate(source, options(device="abacus"), Target())
    with pytest.raises(UsageError, match="--dtype"):
        calibrate(source, options(dtype="int3"), Target())
    Path("model-calibrated").mkdir()
    with pytest.raises(UsageError, match="exists"):
        calibrate(source, options(), Target())


def command(*more: str) -> list[str]:
    arguments = ["calibrate", "model", "--data", token_file(Path("tokens.safetensors"))]
    sizes = ["--samples", str(SAMPLES), "--device", "cpu"]
    return [sys.executable, "-m", "quantkit", *arguments, *sizes, *more]


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | more


def test_killed_runs_continue_to_the_same_bytes() -> None:
    """kill -9 behind different blocks; the same command ends with an undisturbed run's bytes."""
    save_tiny(Path("model"), "llama", num_hidden_layers=16)
    undisturbed = subprocess.run(
        command("-o", "whole"), env=environment(), capture_output=True, text=True, check=False
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    scratch, continued = Path("out.partial/scratch"), False
    for wanted in (1, 9):
        run = subprocess.Popen(
            command("-o", "out"), env=environment(), stderr=subprocess.PIPE, text=True
        )
        while run.poll() is None and len(list(scratch.glob("layer-*.safetensors"))) <= wanted:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        continued |= "continuing behind block" in (run.communicate()[1] or "")
        assert not Path("out").exists() or run.returncode == 0
    done = subprocess.run(
        command("-o", "out"), env=environment(), capture_output=True, text=True, check=False
    )
    if not Path("out").exists():
        assert done.returncode == 0, done.stderr
    assert continued or "continuing behind block" in done.stderr
    names = {p.name for p in Path("whole").iterdir()}
    assert names == {p.name for p in Path("out").iterdir()}
    for name in names - {"quantkit.json"}:
        assert Path("whole", name).read_bytes() == Path("out", name).read_bytes(), name
    assert not Path("out.partial").exists()


# The command line, interrupted by itself as the second layer's statistics get their name.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
seen = []
def hook(event, args):
    if event == "os.rename" and "layer-" in os.fsdecode(args[1]):
        seen.append(args[1])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
from quantkit.cli import main
main()
"""


def test_interrupt_leaves_a_run_to_continue() -> None:
    save_tiny(Path("model"), "llama", num_hidden_layers=12)
    arguments = command("-o", "out")
    assert arguments[1:3] == ["-m", "quantkit"]
    run = subprocess.run(
        [arguments[0], "-c", INTERRUPTED, *arguments[3:]],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert len(list(Path("out.partial").glob("scratch/layer-*.safetensors"))) in (1, 2)
    assert not Path("out").exists()
    other = subprocess.run(
        command("-o", "out", "--seed", "5"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 2
    assert "seed" in other.stderr
    again = subprocess.run(
        command("-o", "out"), env=environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr


def test_dry_run_predicts_and_writes_nothing() -> None:
    source = save_tiny(Path("model"), "llama")
    before = {p.name for p in Path().iterdir()} | {"tokens.safetensors"}
    plan = predict(source, options(), Target())
    assert {p.name for p in Path().iterdir()} == before
    assert plan["layers"] == 2
    assert plan["sites"] == 8
    assert plan["linears"] == 14
    assert plan["output"].endswith("model-calibrated")
    result = calibrate(source, options(), Target())
    assert result is not None
    written = (result.output / FILE).stat().st_size
    assert plan["bytes_written"] == pytest.approx(written, rel=0.25)
