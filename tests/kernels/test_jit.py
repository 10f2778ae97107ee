"""The compile cache: races, corruption, failures and missing tools, with a scripted compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.kernels import jit

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda tools, release 13.0, V$(cat {version})"; exit; fi
echo built >> {log}
sleep 0.3
if grep -q mistake kernel.cu; then echo 'kernel.cu(1): error: a mistake'; exit 2; fi
cp kernel.cu kernel.so
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that copies its input, waits a little, and counts its runs in `log`."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text(FAKE.format(version=tmp_path / "version", log=tmp_path / "log"))
    script.chmod(0o755)
    (tmp_path / "version").write_text("13.0.1")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    jit._nvcc_version.cache_clear()
    yield script
    jit._nvcc_version.cache_clear()


def builds(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_second_compile_reads_the_cache(nvcc: Path, tmp_path: Path) -> None:
    first = jit.compile("int a;", "kernel", "sm_90a")
    assert first.read_text() == "int a;"
    assert jit.compile("int a;", "kernel", "sm_90a") == first
    assert builds(tmp_path) == 1
    left = [path.name for path in jit.cache_dir().iterdir() if path.name.startswith(".")]
    assert left == [], "a private build directory was left behind"


def test_whatever_decides_the_machine_code_is_in_the_key(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "DEVICE_CODE", tmp_path)
    headers = tmp_path
    (headers / "inner.cuh").write_text("// 1")
    (headers / "outer.cuh").write_text('#include "inner.cuh"')
    source = '#include "outer.cuh"\n'

    def key(source: str = source, arch: str = "sm_90a", flags: tuple[str, ...] = ()) -> str:
        jit._nvcc_version.cache_clear()
        return jit.entry_for(source, "kernel", arch, flags).name

    keys = [key(), key(source + " "), key(arch="sm_100a"), key(flags=("-DX",))]
    (headers / "inner.cuh").write_text("// 2")
    keys.append(key())
    (tmp_path / "version").write_text("13.0.2")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    (headers / "unrelated.cuh").write_text("// not included")
    assert key() == keys[-1]


def test_what_is_compiled_is_what_the_key_names(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers that are edited while the compiler runs do not end up under the old key."""
    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr(jit, "DEVICE_CODE", headers)
    (headers / "outer.cuh").write_text("// 1")
    real = jit.subprocess.run

    def edited(command: list[str], **options: object) -> object:
        if "-o" in command:
            (headers / "outer.cuh").write_text("// 2")
        return real(command, **options)

    monkeypatch.setattr(jit.subprocess, "run", edited)
    entry = jit.compile('#include "outer.cuh"\n', "kernel", "sm_90a").parent
    assert (entry / "outer.cuh").read_text() == "// 1"
    assert jit.compile('#include "outer.cuh"\n', "kernel", "sm_90a").parent != entry


def test_two_processes_build_once(nvcc: Path, tmp_path: Path) -> None:
    code = "from quantkit.kernels import jit; print(jit.compile('int race;', 'kernel', 'sm_90a'))"
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "int race;"
    assert builds(tmp_path) == 1


def test_without_locks_the_loser_of_a_race_removes_its_own(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = jit.entry_for("int a;", "kernel", "sm_90a")
    entry.parent.mkdir(parents=True)
    real = jit.subprocess.run

    def slow_compiler(command: list[str], **options: object) -> object:
        done = real(command, **options)
        if "-o" in command and not entry.exists():  # the winner renames its build meanwhile
            monkeypatch.setattr(jit.subprocess, "run", real)
            jit._build(entry, {jit.SOURCE: "int a;"}, "kernel", "sm_90a", (), jit.toolchain())
        return done

    monkeypatch.setattr(jit.subprocess, "run", slow_compiler)
    jit._build(entry, {jit.SOURCE: "int a;"}, "kernel", "sm_90a", (), jit.toolchain())
    assert builds(tmp_path) == 2
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


@pytest.mark.parametrize("damage", ["truncated", "seal missing", "seal not JSON"])
def test_a_corrupt_entry_is_set_aside_and_rebuilt(
    nvcc: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    library = jit.compile("int a;", "kernel", "sm_90a")
    seal = library.with_name(jit.SEAL)
    if damage == "truncated":
        library.write_text("int")
    elif damage == "seal missing":
        seal.unlink()
    else:
        seal.write_text("{")
    assert jit.compile("int a;", "kernel", "sm_90a") == library
    assert library.read_text() == "int a;"
    assert builds(tmp_path) == 2
    assert library.parent.with_name(library.parent.name + ".corrupt").is_dir()
    assert "corrupt" in capsys.readouterr().err


def test_a_killed_build_leaves_nothing_that_counts(nvcc: Path, tmp_path: Path) -> None:
    code = "from quantkit.kernels import jit; jit.compile('int a;', 'kernel', 'sm_90a')"
    process = subprocess.Popen([sys.executable, "-c", code])
    while builds(tmp_path) == 0 and process.poll() is None:
        pass
    process.kill()
    process.wait()
    entry = jit.entry_for("int a;", "kernel", "sm_90a")
    assert not entry.exists()
    assert list(entry.parent.glob(".*")), "the killed build's private folder"
    assert jit.compile("int a;", "kernel", "sm_90a").read_text() == "int a;"
    assert not list(entry.parent.glob(".*"))


def test_a_failing_source_shows_command_and_log(nvcc: Path, tmp_path: Path) -> None:
    with pytest.raises(jit.CompileError) as caught:
        jit.compile("a mistake", "kernel", "sm_90a", ("-DX=1",))
    assert "kernel.cu(1): error: a mistake" in caught.value.message
    hint = caught.value.hint or ""
    assert str(nvcc) in hint
    assert "-DX=1" in hint
    assert hint.splitlines()[-1].strip() == "kernel.cu(1): error: a mistake"
    kept = Path(re.search(r"^in (\S+) the command", hint).group(1))  # type: ignore[union-attr]
    assert "a mistake" in (kept / jit.LOG).read_text()
    # The kept command runs again, as it stands, in the kept folder.
    again = subprocess.run(
        (kept / jit.COMMAND).read_text(), shell=True, cwd=kept, capture_output=True, check=False
    )
    assert again.returncode == 2
    assert not jit.entry_for("a mistake", "kernel", "sm_90a", ("-DX=1",)).exists()


def test_missing_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit.os, "access", lambda *_: False)
    monkeypatch.setattr(jit.shutil, "which", lambda _: None)
    with pytest.raises(jit.MissingCompiler) as caught:
        jit.compile("int a;", "kernel", "sm_90a")
    assert "pip install nvidia-cuda-nvcc" in (caught.value.hint or "")


def test_missing_headers_say_what_to_install(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(jit.MissingCompiler, match="CUTLASS") as caught:
        jit.compile("int a;", "kernel", "sm_90a")
    assert "nvidia-cutlass" in (caught.value.hint or "")


def test_a_compiler_that_does_not_run_is_named(nvcc: Path) -> None:
    nvcc.write_text("#!/bin/sh\necho broken toolkit >&2; exit 1\n")
    jit._nvcc_version.cache_clear()
    with pytest.raises(jit.MissingCompiler, match="broken toolkit"):
        jit.toolchain()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_cache_names_the_variable(nvcc: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("cache").mkdir(mode=0o500)
    with pytest.raises(QuantkitError) as caught:
        jit.compile("int a;", "kernel", "sm_90a")
    assert "QUANTKIT_CACHE" in (caught.value.hint or "")


def test_finding_cutlass_imports_none_of_its_generators() -> None:
    code = (
        "import sys; from quantkit.kernels import jit; jit.find_cutlass()\n"
        "sys.exit('cutlass_library' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def real_nvcc() -> str | None:
    try:
        jit.toolchain()
    except jit.MissingCompiler as error:
        return error.message
    return None


@pytest.mark.skipif(real_nvcc() is not None, reason=str(real_nvcc()))
def test_cute_host_code_compiles_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    source = (
        "#include <cute/layout.hpp>\n"
        "__global__ void nothing() {}\n"
        'extern "C" int answer() { return cute::size(cute::make_shape(6, 7)); }\n'
    )
    assert jit.load(source, "answer", "sm_90a").answer() == 42
