"""The sm90 kernels' own source on a CPU, instruction wrappers replaced by `emulated_atoms.cuh`.

What runs is the host code that launches them, too. Numbers, schedules, barriers and the order of
asynchronous work are checked; speed, registers and memory ordering need the GPU (test_sm90.py).
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gemm
from quantkit.errors import QuantkitError
from quantkit.kernels import sm90, sm90_tiles
from quantkit.kernels.sm90_tiles import Tile
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
    flags = torch.zeros(SMS, dtype=torch.int32)
    monkeypatch.setattr(sm90.jit, "load", emulator.load)
    monkeypatch.setattr(sm90, "_stream", lambda x: None)
    monkeypatch.setattr(sm90, "_multiprocessors", lambda device: SMS)
    monkeypatch.setattr(sm90, "_partials", lambda like, sums: torch.full((sums,), torch.nan))
    monkeypatch.setattr(sm90, "_flags_of_stream", lambda device: flags)


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
    monkeypatch.setattr(sm90_tiles, "careful", lambda tile: tile)  # that of 16-bit results
    y = module.multiply(*operands, torch.float32)
    assert relative_error(y, expected) <= EXACT
    assert torch.equal(y.bfloat16(), module.multiply(*operands, torch.bfloat16))
    assert torch.equal(y.half(), module.multiply(*operands, torch.float16))


@pytest.mark.parametrize(
    ("width", "outputs", "branch", "tokens", "tile"),
    [
        (2048, (704,), "fp8", 5, Tile(8, 3, 1, 2, 6, 2048)),  # split tiles
        (1664, (704,), "bf16", 16, Tile(16, 3, 1, 2, 6, 2048)),
        (1024, (320,), None, 20, Tile(32, 1, 4, 1, 5, 512, 2)),  # in clusters of two
        (2048, (704,), None, 48, Tile(64, 3, 1, 2, 5, 2048, 2)),
        (1024, (320,), "bf16", 40, Tile(64, 3, 1, 2, 5, 2048, 2)),
        (2496, (320,), "fp8", 270, Tile(256, 2, 1, 1, 5, 1024, 2)),  # rows far apart: short sums
        (3200, (192,), "fp8", 270, Tile(256, 2, 1, 1, 5, 1024)),
        (1472, (192,), "bf16", 300, Tile(256, 2, 1, 1, 5, 1024, 2)),
    ],
)
def test_tiles_are_exact_up_to_their_sum(
    emulator,
    monkeypatch,
    width: int,
    outputs: tuple[int, ...],
    branch: str | None,
    tokens: int,
    tile: Tile,
) -> None:
    run_on(emulator, monkeypatch)
    check_tile(tile, width, outputs, branch, tokens, monkeypatch)


@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
def test_prefill_sums_are_long_where_numbers_are_of_like_size(
    emulator, monkeypatch, branch: str | None
) -> None:
    run_on(emulator, monkeypatch)
    monkeypatch.setattr(sm90_tiles, "careful", lambda tile: tile)  # that of 16-bit results
    task = work(1184, (192,), branch, 48 if branch else 0)
    linears = layer(task, "cpu", 119, 121)
    linears[0]["weight_packed"] |= 0x22  # no block without large numbers, nor a row of zeros
    module = sm90.ExactFoldLinear(task, linears)
    x = torch.randn(270, 1184, generator=torch.Generator().manual_seed(1)).bfloat16()
    for far in ([], [7, 269]):  # tokens with one number far above the others
        x[far, 5] = 3000.0
        tokens, scales, count = module.quantize(x)
        outlier = branch and 5 in linears[0]["outlier_index"]
        assert (scales[:270, 0] < 0).nonzero()[:, 0].tolist() == ([] if outlier else far)
        y = module.multiply(tokens, scales, count, torch.float32)
        assert relative_error(y, exact(task, linears, x)) <= EXACT
    assert (module.quantize(x[:40])[1][:, 0] > 0)[:40].all()  # decode does not ask


ALL_TILES = (*sm90_tiles.TILES, *sm90_tiles.CANDIDATES)
IN_PARTS = [tile for tile in ALL_TILES if tile.parts > 1]


@pytest.mark.parametrize("tile", IN_PARTS, ids=lambda t: f"{t.tokens}-{t.row_groups}-{t.parts}")
@pytest.mark.parametrize(
    ("width", "outputs", "branch", "ragged"),
    [
        (4224, (192, 64), None, 5),
        (576, (60,), "bf16", 1),  # parts without a step, a branch in the last
        (1664, (320,), "fp8", 0),
    ],
)
def test_parts_of_a_cluster_are_exact_up_to_their_sum(
    emulator,
    monkeypatch,
    tile: Tile,
    width: int,
    outputs: tuple[int, ...],
    branch: str | None,
    ragged: int,
) -> None:
    run_on(emulator, monkeypatch)
    check_tile(tile, width, outputs, branch, tile.tokens - ragged, monkeypatch)


def test_parts_of_several_token_tiles(emulator, monkeypatch) -> None:
    run_on(emulator, monkeypatch)
    tile = next(tile for tile in IN_PARTS if (tile.tokens, tile.row_groups) == (64, 2))
    check_tile(tile, 640, (192,), "bf16", 130, monkeypatch)


def check_tile(
    tile: Tile,
    width: int,
    outputs: tuple[int, ...],
    branch: str | None,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile = replace(tile, promote=min(tile.promote, 1024))
    monkeypatch.setattr(sm90_tiles, "careful", lambda tile: tile)
    task = work(width, outputs, branch, 48 if branch else 0)
    linears = layer(task)
    module = sm90.ExactFoldLinear(task, linears)
    x = inputs(tokens, width)
    with sm90_tiles.trying(tile):
        assert sm90_tiles.plan(sum(outputs), width, tokens, SMS).tile == tile
        y = product(module, x)
        assert torch.equal(y, product(module, x))
    assert relative_error(y, exact(task, linears, x)) <= EXACT


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


def rms_norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return gain * wide.to(x.dtype)


def token_bytes(
    module: sm90.ExactFoldLinear, operands: tuple[torch.Tensor, torch.Tensor, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What was written of each token, [tokens, bytes]: main bricks and branch bricks."""
    tiles, _, count = operands
    size = sm90_tiles.token_tile(count)
    parts = tiles.split([main := -(-module.width // 128) * size * 128, tiles.shape[1] - main], 1)
    of_token = [
        part.reshape(len(tiles), -1, size, brick).transpose(1, 2).flatten(0, 1)[:count].flatten(1)
        for part, brick in zip(parts, (128, 64), strict=True)
    ]
    return of_token[0], of_token[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branch", [None, "bf16", "fp8"])
@pytest.mark.parametrize("hadamard", [None, {"block": 32}])
def test_rms_norm_inside_the_activation_kernel(
    emulator, monkeypatch, branch: str | None, hadamard: dict[str, int] | None, dtype: torch.dtype
) -> None:
    """Bit for bit where float32 adds the squares exactly in any order."""
    run_on(emulator, monkeypatch)
    task = work(576, (64,), branch, 48 if branch else 0, hadamard=hadamard, dtype=dtype)
    module = sm90.ExactFoldLinear(task, layer(task))
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-96, 97, (5, 576), generator=generator).to(dtype)
    x[3] = 0
    gain = (1 + torch.randn(576, generator=generator) / 4).to(dtype)
    operands = module.quantize(x, norm=(gain, 1e-6))
    expected = module.quantize(rms_norm(x, gain, 1e-6))
    for ours, theirs in zip(
        *(token_bytes(module, found) for found in (operands, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(operands[1][:5], expected[1][:5])
    assert torch.equal(module.normed(x, gain, 1e-6), module(rms_norm(x, gain, 1e-6)))


@pytest.mark.parametrize("width", [640, 4096, 16384])  # one, one, and four units a thread
def test_another_order_of_the_squares_moves_few_codes(emulator, monkeypatch, width: int) -> None:
    run_on(emulator, monkeypatch)
    task = work(width, (64,))
    module = sm90.ExactFoldLinear(task, layer(task))
    tokens = 130 if width > 8192 else 5  # past 128 a token has one CTA
    x = inputs(tokens, width)
    gain = (1 + torch.randn(width, generator=torch.Generator().manual_seed(1)) / 4).bfloat16()
    operands = module.quantize(x, norm=(gain, 1e-5))
    wide = x.double()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)  # the float64 sum
    expected = module.quantize(gain * wide.bfloat16())
    codes, expected_codes = (token_bytes(module, found)[0] for found in (operands, expected))
    assert codes.shape == (tokens, width)
    same = (operands[1] == expected[1])[:tokens].all(1)  # or a token's largest block moved
    assert same.float().mean() > 0.95
    assert (codes != expected_codes)[same].float().mean() < 1 / 500


def test_the_benchmark_measures_right_results(emulator, monkeypatch) -> None:
    run_on(emulator, monkeypatch)
    monkeypatch.setattr(
        gemm.dispatch, "prepare", lambda site, work, linears, _: sm90.ExactFoldLinear(work, linears)
    )
    monkeypatch.setattr(gemm.bench, "COLD_BYTES", 0)
    for name in ("rms_norm", "swiglu"):  # not by torch.compile
        monkeypatch.setattr(gemm, name, getattr(gemm, name)._torchdynamo_orig_callable)
    tiles = (Tile(8, 3, 1, 2, 6, 2048, 2), Tile(256, 2, 1, 1, 5, 4096))
    monkeypatch.setattr(sm90_tiles, "CANDIDATES", tiles)
    options = argparse.Namespace(
        shapes=[(192, 512)], tokens=(3, 200), peers=["bf16"], candidates=True, norms=True, repeats=1
    )
    launches = []

    def timer(calls, repeats: int, rest: float) -> float:
        launches.append(sm90.OVERLAP)
        for call in calls:
            call()
        return 2.0

    monkeypatch.setattr(gemm.bench, "graph_time", timer)
    found = {"device": "a CPU", "torch": "2", "bandwidth": 1e12}
    with torch.inference_mode():
        found["cells"] = list(gemm.cells(options, torch.device("cpu"), 1e12))
    assert [(c["tokens"], c["branch"]) for c in found["cells"]] == [
        (3, None), (200, None), (3, "bf16"), (200, "bf16"), (3, "fp8"),
    ]  # fmt: skip
    assert all(cell["error"] < 2.5e-3 and cell["repeats"] for cell in found["cells"])
    assert sm90.OVERLAP
    assert False in launches
    lines = gemm.as_table(found, gemm.markdown).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].startswith("| 192, 512 | 3 | none | - | 2.0 | 2.0 |")
    tried = gemm.tried(found)
    assert len(tried) == 5
    differences = [us["difference"] for c in found["cells"] for us in c["candidates"].values()]
    assert all(difference < 2e-3 for difference in differences)


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
    "what another CTA sends is read before it is there": ("  barrier.wait(0);", "  ;"),
    "a CTA waits for what another finishes": ("if (part != finisher) {", "if (part < finisher) {"),
}


@pytest.mark.slow
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
    tile = IN_PARTS[0] if "CTA" in fault else sm90_tiles.plan(704, 8192, 2, SMS).tile
    try:
        with sm90_tiles.trying(tile):
            error = relative_error(product(module, x), exact(task, linears, x))
    except QuantkitError as refused:
        assert "failed to launch" in refused.message  # noqa: PT017
    else:
        assert not error <= EXACT
