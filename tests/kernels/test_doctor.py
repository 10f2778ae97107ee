"""`quantkit doctor` and `quantkit kernels build` say what is there and what would run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.kernels import ahead, capability, doctor, generate, jit
from tests.test_cli import quantkit


def test_doctor_prints_one_json_object() -> None:
    done = quantkit("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["weights"] for row in found["formats"]} == {"mxfp4", "nvfp4", "mxfp8"}
    for row in found["formats"]:
        assert row["here"]["kernel"]
        assert row["here"]["why"]
        assert row["elsewhere"]["Blackwell (B200)"] == "sm100 block-scaled"
    assert found["packages"]["torch"]


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> jit.Toolchain:
        raise jit.MissingCompiler("no CUDA compiler", "pip install nvidia-cuda-nvcc")

    monkeypatch.setattr(jit, "toolchain", missing)
    monkeypatch.setattr(
        doctor,
        "_devices",
        lambda: [{"index": 0, "name": "a GPU", "capability": (10, 0)}],
    )
    found = doctor.examine()
    assert found["formats"][0]["here"] == {"kernel": "reference", "why": "no CUDA compiler"}
    assert "pip install nvidia-cuda-nvcc" in doctor.as_text(found)


@pytest.mark.parametrize(("version", "kernel"), [("12.6.1", "reference"), ("13.0.88", "sm120")])
def test_doctor_compares_the_compiler_with_the_instructions(
    version: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = jit.Toolchain(Path("nvcc"), version, Path("include"), "4.2.0")
    monkeypatch.setattr(jit, "toolchain", lambda: tools)
    monkeypatch.setattr(
        doctor,
        "_devices",
        lambda: [{"index": 0, "name": "a GPU", "capability": (12, 0)}],
    )
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    here = doctor.examine()["formats"][0]["here"]
    assert here["kernel"].startswith(kernel)
    if kernel == "reference":
        assert "needs nvcc 12.8" in here["why"]
    else:
        assert "bf16" in here["why"]


def test_doctor_names_the_branches_of_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = jit.Toolchain(Path("nvcc"), "13.0.88", Path("include"), "4.2.0")
    monkeypatch.setattr(jit, "toolchain", lambda: tools)
    hopper = [{"index": 0, "name": "a GPU", "capability": (9, 0)}]
    monkeypatch.setattr(doctor, "_devices", lambda: hopper)
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    rows = {
        (row["weights"], row["activations"]): row["here"] for row in doctor.examine()["formats"]
    }
    assert rows["mxfp4", "mxfp4"]["kernel"] == "sm90 exact-fold"
    assert rows["nvfp4", "nvfp4"]["kernel"] == "sm90 bf16"
    assert {here["why"] for here in rows.values()} == {"branches: bf16, fp8"}


def test_doctor_counts_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    for name in ("a-sm_90a-1", "b-sm_90a-2", "b-sm_90a-2.failed", "a-sm_90a-1.corrupt"):
        folder = tmp_path / "kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.so").write_bytes(b"1234")
    (tmp_path / "kernels" / "a-sm_90a-1.lock").touch()
    cache = doctor.examine()["cache"]
    assert (cache["kernels"], cache["failed"], cache["corrupt"]) == (2, 1, 1)
    assert cache["bytes"] == 16


def test_build_names_what_it_does_not_know() -> None:
    for arguments in (("--arch", "sm_1"), ("--arch", "sm_100a", "--format", "int3")):
        done = quantkit("kernels", "build", *arguments)
        assert done.returncode == 2
        assert "hint: " in done.stderr
        assert "Traceback" not in done.stderr


def test_build_compiles_what_is_missing_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(ahead, "_entry", lambda source: Path(source.text))
    monkeypatch.setattr(jit, "is_valid", lambda entry: str(entry) in built)
    monkeypatch.setattr(jit, "compile", lambda text, name, arch: built.append(text))
    first = ahead.build(["sm_100a"], ["mxfp4"], jobs=2)
    assert first["compiled"] == first["kernels"] == len(built) > 2
    assert ahead.build(["sm_100a"], ["mxfp4"])["compiled"] == 0


def test_build_stops_at_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str, name: str, arch: str) -> Path:
        raise jit.CompileError(f"nvcc could not compile {name}", "its log")

    monkeypatch.setattr(ahead, "_entry", lambda source: Path("/nowhere"))
    monkeypatch.setattr(jit, "compile", broken)
    with pytest.raises(jit.CompileError):
        ahead.build(["sm_120a"], ["nvfp4"], jobs=1)


def test_an_unknown_format_is_refused_before_compiling() -> None:
    with pytest.raises(UsageError, match="int3"):
        ahead.build(["sm_100a"], ["int3"])


@pytest.mark.parametrize("arch", ahead.architectures())
def test_sources_are_distinct_and_of_their_architecture(arch: str) -> None:
    found = list(generate.sources(arch))
    assert len({source.text for source in found}) == len(found)
    assert {source.arch for source in found} == {arch}
    pairs = {(row.weights, row.activations) for row in capability.KERNELS if row.arch == arch}
    for pair in pairs:
        assert list(generate.sources(arch, [pair])), pair
