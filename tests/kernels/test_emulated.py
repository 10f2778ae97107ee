"""The sm90 kernels' own source on a CPU, instruction wrappers replaced by `emulated_atoms.cuh`.

What runs is the host code that launches them, too. Numbers, schedules, barriers and the order of
asynchronous work are checked; speed, registers and memory ordering need the GPU (test_sm90.py).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.kernels import sm90, sm90_tiles
from tests.kernels.test_sm90 import exact, layer, relative_error, work

SMS = 8
EXACT = 1e-6  # relative: products are exact, an emulated sum rounds once a k-step
SOURCES = Path(sm90.__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
Load = Callable[[str, str, str], ctypes.CDLL]


class Emulator:
    """Builds what `jit.load` is asked for with g++; `change` edits the sources first."""

    def __init__(self, folder: Path, change: Callable[[str], str] = lambda text: text) -> None:
        self.folder = folder
        self.loaded: dict[str, ctypes.CDLL] = {}
        for source in SOURCES.glob("sm90_*.cuh"):
            (folder / source.name).write_text(change(source.read_text()))
        for source in Path(__file__).parent.glob("emulated_*.cuh"):
            name = source.name.replace("emulated_atoms", "sm90_atoms")
            (folder / name).write_text(source.read_text())

    def load(self, text: str, name: str, arch: str) -> ctypes.CDLL:
        """The library of an instantiation."""
        if text not in self.loaded:
            source = self.folder / f"{name}{len(self.loaded)}.cc"
            source.write_text(text)
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
            library = str(source.with_suffix(".so"))
            command = ["g++", *flags, "-o", library, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            self.loaded[text] = ctypes.CDLL(library)
        return self.loaded[text]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


def run_on(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sm90.py launch emulated kernels on a GPU of SMS multiprocessors."""
    slot = max(t.row_groups * 64 * t.tokens for t in sm90_tiles.TILES)
    workspace = torch.full((SMS * slot,), torch.nan), torch.zeros(SMS, dtype=torch.int32)
    monkeypatch.setattr(sm90.jit, "load", emulator.load)
    monkeypatch.setattr(sm90, "_stream", lambda x: None)
    monkeypatch.setattr(sm90, "_multiprocessors", lambda device: SMS)
    monkeypatch.setattr(sm90, "_workspace", lambda like: workspace)


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(2 * torch.randn(1, width, generator=generator))
    return (torch.randn(tokens, width, generator=generator) * spread).to(torch.bfloat16)


def product(module: sm90.ExactFoldLinear, x: torch.Tensor) -> torch.Tensor:
    return module.multiply(*module.quantize(x), torch.float32)


@pytest.mark.parametrize(
    ("width", "outputs", "branch", "tokens"),
    [
        (512, (128, 60), "bf16", 5),  # some CTAs split tiles, one has half a row block
        (1024, (192,), "fp8", 16),
        (8192, (704,), None, 2),  # more steps a CTA than stages
        (1024, (256, 128), None, 40),
        (640, (192,), "fp8", 300),
    ],
)
def test_the_gemm_is_exact_up_to_its_sum(
    emulator, monkeypatch, width: int, outputs: tuple[int, ...], branch: str | None, tokens: int
) -> None:
    run_on(emulator, monkeypatch)
    task = work(width, outputs, branch, 48 if branch else 0)
    linears = layer(task)
    module = sm90.ExactFoldLinear(task, linears)
    x = inputs(tokens, width)
    expected = exact(task, linears, x)
    operands = module.quantize(x)
    y = module.multiply(*operands, torch.float32)
    assert relative_error(y, expected) <= EXACT
    assert torch.equal(y, module.multiply(*operands, torch.float32))
    assert torch.equal(y.bfloat16(), module.multiply(*operands, torch.bfloat16))
    assert torch.equal(y.half(), module.multiply(*operands, torch.float16))


def test_rows_of_wide_span_take_more_planes(emulator, monkeypatch) -> None:
    run_on(emulator, monkeypatch)
    task = work(512, (128,))
    linears = layer(task, low=118, high=124)
    linears[0]["weight_scale"][5, ::2] = 90
    linears[0]["weight_scale"][100, 3] = 140
    linears[0]["weight_scale"][100, 4] = 100
    module = sm90.ExactFoldLinear(task, linears)
    assert module.planes == 3
    x = inputs(7, 512)
    assert relative_error(product(module, x), exact(task, linears, x)) <= EXACT


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
@pytest.mark.parametrize("hadamard", [None, {"block": 64}])
def test_activations_are_quantized_as_the_reference_does(
    emulator, monkeypatch, rule: str, hadamard: dict[str, int] | None
) -> None:
    run_on(emulator, monkeypatch)
    task = work(576, (64,), "bf16", 48, rule=rule, hadamard=hadamard)
    linears = layer(task)
    module = sm90.ExactFoldLinear(task, linears)
    x = inputs(4, 576)
    assert relative_error(product(module, x), exact(task, linears, x)) <= EXACT


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
def test_swiglu_inside_the_activation_kernel(emulator, monkeypatch, branch: str | None) -> None:
    run_on(emulator, monkeypatch)
    task = work(576, (64,), branch, 48 if branch else 0)
    module = sm90.ExactFoldLinear(task, layer(task))
    gate, up = inputs(5, 576), inputs(5, 576, seed=1)
    gated = torch.nn.functional.silu(gate) * up
    tiles, scales, _ = module.quantize(torch.cat([gate, up], 1), gated=True)
    expected, expected_scales, _ = module.quantize(gated)
    # Five of a tile's eight tokens are there; the exponential may round the other way, rarely.
    rows, blocks = 5 * (128 * 5), slice(0, 5 * 8 * 128)
    tiles, expected = (t[:, blocks].reshape(5, 8, 128)[:, :5] for t in (tiles, expected))
    assert (tiles != expected).sum() <= rows / 500
    assert torch.equal(scales[:5], expected_scales[:5])


RELEASE = "      cute::warpgroup_wait<1>();\n      if (j == 0 && pending >= 0) release(pending);\n"
FAULTS = {
    "a stage is given back while it is read": (
        RELEASE,
        "      if (j == 0) release(ring.stage);\n      cute::warpgroup_wait<1>();\n",
    ),
    "a stage is filled while it is read": (
        "shared.empty[ring.stage].wait(ring.phase ^ 1);",
        ";",
    ),
    "sums are read before they are there": ("cute::warpgroup_wait<0>();", ";"),
    "nobody says that partial sums are there": (
        "  barrier_arrive(kPartners, T::kRowGroups * 128 + 32);\n",
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, tmp_path: Path, monkeypatch) -> None:
    """The checks above would see a kernel that breaks its own protocol."""
    right, wrong = FAULTS[fault]
    sources = "".join(source.read_text() for source in SOURCES.glob("sm90_*.cuh"))
    assert right in sources
    faulty = Emulator(tmp_path, lambda text: text.replace(right, wrong))
    run_on(faulty, monkeypatch)
    task = work(8192, (704,))  # split tiles, and more steps a CTA than stages
    linears = layer(task)
    module = sm90.ExactFoldLinear(task, linears)
    x = inputs(2, 8192)
    try:
        error = relative_error(product(module, x), exact(task, linears, x))
    except QuantkitError as refused:
        assert "failed to launch" in refused.message  # noqa: PT017
    else:
        assert not error <= EXACT
