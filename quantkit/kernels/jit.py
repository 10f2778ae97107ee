"""Compile one kernel source with nvcc, once a machine: private build, one rename, checked cache.

A cache entry is a directory `<name>-<key>/` holding the library, its source, the command and the
compiler's output. It is built under another name and renamed when whole, because a directory
rename is atomic and leaves no stale file behind on network disks; a process that loses a race
removes its own build. Layout after DeepGEMM's `csrc/jit` and quack's `cache/jit.py`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit import console
from quantkit.errors import QuantkitError, one_line

DEVICE_CODE = Path(__file__).parent
LIBRARY, SOURCE, COMMAND, LOG, SEAL = (
    "kernel.so",
    "kernel.cu",
    "command.txt",
    "log.txt",
    "seal.json",
)

BASE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-shared",
    "-Xcompiler=-fPIC,-fno-gnu-unique",  # two kernels in one process share no template statics
    "-Xlinker=-Bsymbolic",
)


class MissingCompiler(QuantkitError):
    """No nvcc, or no CUTLASS headers: nothing can be compiled on this machine."""


class CompileError(QuantkitError):
    """nvcc refused a kernel source; the hint has one line for each of the command and the log."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = "\n".join(one_line(line) for line in hint.splitlines())


@dataclass(frozen=True)
class Toolchain:
    """What compiles a kernel: its parts that decide the machine code are in the cache key."""

    nvcc: Path
    nvcc_version: str
    cutlass: Path  # the include directory
    cutlass_version: str


def find_nvcc() -> Path:
    """Return nvcc from `CUDA_HOME`, PATH, the pip package or `/usr/local/cuda`, in this order."""
    candidates: list[Path] = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "bin" / "nvcc")
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    spec = importlib.util.find_spec("nvidia")  # a namespace package: this imports nothing
    for root in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(root).glob("cu[0-9]*/bin/nvcc"), reverse=True)
        candidates.append(Path(root) / "cuda_nvcc" / "bin" / "nvcc")
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise MissingCompiler(
        "no CUDA compiler (nvcc) in CUDA_HOME, on PATH or in the Python environment",
        "pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or set CUDA_HOME to a CUDA toolkit",
    )


def find_cutlass() -> tuple[Path, str]:
    """Return the include directory of the `nvidia-cutlass` wheel and its version."""
    # `cutlass_library.source_path` is this folder; importing the package would load its generators.
    spec = importlib.util.find_spec("cutlass_library")
    for root in (spec.submodule_search_locations or []) if spec else []:
        include = Path(root) / "source" / "include"
        header = include / "cutlass" / "version.h"
        if header.is_file():
            parts = dict(
                re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", header.read_text())
            )
            return include, ".".join(parts[part] for part in ("MAJOR", "MINOR", "PATCH"))
    raise MissingCompiler(
        "the CUTLASS headers are not installed", 'pip install "nvidia-cutlass>=4.2,<5"'
    )


@functools.cache
def _nvcc_version(nvcc: Path) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    if done.returncode or not match:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise MissingCompiler(
            f"{nvcc} does not run: {said[-1] if said else f'exit code {done.returncode}'}",
            "set CUDA_HOME to a working CUDA toolkit",
        )
    return match.group(1)


def toolchain() -> Toolchain:
    """Return the compiler and headers of this machine. Raises MissingCompiler."""
    nvcc = find_nvcc()
    cutlass, version = find_cutlass()
    return Toolchain(nvcc, _nvcc_version(nvcc), cutlass, version)


def cache_dir() -> Path:
    """Return the folder of compiled kernels: `QUANTKIT_CACHE`, or the user's cache directory."""
    if root := os.environ.get("QUANTKIT_CACHE"):
        return Path(root).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "quantkit" / "kernels"


def own_headers(source: str) -> dict[str, str]:
    """Return the text of every header of ours that `source` includes, directly or not, by name."""
    found: dict[str, str] = {}
    todo = [source]
    while todo:
        for name in re.findall(r'^\s*#\s*include\s+"([^"/]+)"', todo.pop(), re.MULTILINE):
            path = DEVICE_CODE / name
            if name not in found and path.is_file():
                found[name] = path.read_text()
                todo.append(found[name])
    return found


def cache_key(
    source: str, headers: Mapping[str, str], arch: str, flags: Sequence[str], tools: Toolchain
) -> str:
    """Return the digest of everything that decides the machine code of `source`."""
    parts = {
        "source": source,
        "headers": headers,
        "arch": arch,
        "flags": [*BASE_FLAGS, *flags],
        "nvcc": tools.nvcc_version,
        "cutlass": tools.cutlass_version,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def is_valid(entry: Path) -> bool:
    """Say whether a cache entry is whole: the library is the one that was sealed."""
    try:
        seal = json.loads((entry / SEAL).read_text())
        return bool(seal["sha256"] == _sha256(entry / LIBRARY))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def entry_for(source: str, name: str, arch: str, flags: Sequence[str] = ()) -> Path:
    """Return where `compile` keeps this kernel, whether it is there yet or not."""
    key = cache_key(source, own_headers(source), arch, flags, toolchain())
    return cache_dir() / f"{name}-{arch}-{key}"


def compile(source: str, name: str, arch: str, flags: Sequence[str] = ()) -> Path:
    """Compile `source` to a shared library of extern "C" functions and return its path.

    `name` is a readable stem, `arch` an nvcc target such as `sm_90a`, `flags` come after
    `BASE_FLAGS`. Headers in this folder and CUTLASS's are on the include path. A valid cache
    entry is returned as it is; a corrupt one is set aside as `*.corrupt` and built again.
    Raises MissingCompiler, and CompileError with the command and the compiler's output.
    """
    tools, headers = toolchain(), own_headers(source)
    entry = cache_dir() / f"{name}-{arch}-{cache_key(source, headers, arch, flags, tools)}"
    if is_valid(entry):
        return entry / LIBRARY
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_name(entry.name + ".lock")) as alone:
            if not is_valid(entry):  # another process may have built it while this one waited
                _set_aside(entry)
                if alone:  # what a killed build left
                    for left in entry.parent.glob(f".{entry.name}.*"):
                        shutil.rmtree(left, ignore_errors=True)
                _build(entry, {SOURCE: source, **headers}, name, arch, flags, tools)
    except PermissionError as error:
        raise QuantkitError(
            f"the kernel cache {cache_dir()} cannot be written: {error.strerror}",
            "set QUANTKIT_CACHE to a folder you can write to",
        ) from error
    return entry / LIBRARY


@functools.cache
def load(source: str, name: str, arch: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile `source` if needed and load its library, once a process."""
    return ctypes.CDLL(str(compile(source, name, arch, flags)))


def command_line(arch: str, flags: Sequence[str], tools: Toolchain) -> list[str]:
    """Return the nvcc command that compiles `kernel.cu` to `kernel.so` in the current folder."""
    number = arch.removeprefix("sm_")
    libraries = [path for path in (tools.nvcc.parent.parent / "lib",) if path.is_dir()]
    return [
        str(tools.nvcc),
        *BASE_FLAGS,
        f"-gencode=arch=compute_{number},code=sm_{number}",
        *flags,
        f"-I{DEVICE_CODE}",
        f"-I{tools.cutlass}",
        *(f"-L{path}" for path in libraries),  # where the pip package keeps the CUDA runtime
        "-o",
        LIBRARY,
        SOURCE,
    ]


def _build(
    entry: Path,
    sources: Mapping[str, str],
    name: str,
    arch: str,
    flags: Sequence[str],
    tools: Toolchain,
) -> None:
    private = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        command = command_line(arch, flags, tools)
        for file, text in sources.items():  # the texts in the key, whatever an editor does now
            (private / file).write_text(text)
        (private / COMMAND).write_text(shlex.join(command) + "\n")
        console.note(f"compiling kernel {name} for {arch} (once; kept in {entry.parent})")
        with (private / LOG).open("w") as log:
            done = subprocess.run(
                command, cwd=private, stdout=log, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            raise _failure(entry, private, name, arch, done.returncode)
        seal = {"sha256": _sha256(private / LIBRARY), "nvcc": tools.nvcc_version}
        (private / SEAL).write_text(json.dumps(seal))
        for path in (*private.iterdir(), private):
            _fsync(path)
        try:
            private.rename(entry)
        except OSError as error:
            # Without working locks another process may have finished first: its build is as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_valid(entry):
                raise
        _fsync(entry.parent)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _failure(entry: Path, private: Path, name: str, arch: str, code: int) -> CompileError:
    """Keep source, command and log of a failed build beside the cache, and say where."""
    kept = entry.with_name(entry.name + ".failed")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(private, kept)
    log = (kept / LOG).read_text(errors="replace").strip()
    lines = log.splitlines()
    first = next((line for line in lines if "error" in line.lower()), f"exit code {code}")
    return CompileError(
        f"nvcc could not compile {name} for {arch}: {first.strip()}",
        f"in {kept} the command was\n  {(kept / COMMAND).read_text().strip()}\n"
        f"and its output, kept in {LOG} there, ends with\n  " + "\n  ".join(lines[-20:]),
    )


def _set_aside(entry: Path) -> None:
    if entry.exists():
        corrupt = entry.with_name(entry.name + ".corrupt")
        shutil.rmtree(corrupt, ignore_errors=True)
        entry.rename(corrupt)
        console.warn(f"compiled kernel {entry.name} is corrupt: kept as {corrupt}, compiling again")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path`, or yield False where locks do not work.

    Then a kernel may be built twice; the rename keeps that safe.
    """
    import fcntl

    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            console.warn(f"no file lock on {path} ({error.strerror}): a kernel may be built twice")
            yield False
        else:
            yield True


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
