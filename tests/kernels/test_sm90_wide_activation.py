"""Activations of Hopper's products in bfloat16: the kernel's bits beside those of torch."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.kernels import generate, sm90, sm90_tiles, sm90_wide
from quantkit.kernels import sm90_wide_activation as activation
from quantkit.kernels.prepare import BRANCH_COLUMNS
from quantkit.kernels.sm90_wide_activation import Recipe
from tests.kernels.test_sm90 import built, relative_error
from tests.kernels.test_sm90_wide import wide_layer, wide_work

__all__ = ["built"]
BRANCHES = (None, "bf16", "fp8")
FORMATS = ("nvfp4", "mxfp8")
Norm = tuple[Tensor, float]


@dataclass(frozen=True)
class Operands:
    """What the GEMM reads of the tokens there are."""

    main: Tensor  # bfloat16 [tokens, columns]
    branch: Tensor  # bytes, or bfloat16
    scales: Tensor  # float32 [tokens, 2]


def operands(found: tuple[Tensor, Tensor], recipe: Recipe, width: int, tokens: int) -> Operands:
    """Bricks as rows, each in its own swizzle still."""
    tiles, scales = found
    size = sm90_tiles.token_tile(tokens)
    main = -(-width // 64) * size * 128
    parts = [
        part.reshape(len(tiles), -1, size, row).transpose(1, 2).flatten(0, 1)[:tokens].flatten(1)
        for part, row in zip(tiles.split([main, tiles.shape[1] - main], 1), (128, 64), strict=True)
    ]
    branch = parts[1].contiguous()
    if recipe.branch == "bf16":
        branch = branch.view(torch.bfloat16)
    return Operands(parts[0].contiguous().view(torch.bfloat16), branch, scales[:tokens])


def both(
    x: Tensor,
    recipe: Recipe,
    divisor: float = 37.5,
    gated: bool = False,
    norm: Norm | None = None,
    outliers: int = 45,
) -> tuple[Operands, Operands]:
    """The kernel's and torch's."""
    width = x.shape[1] // 2 if gated else x.shape[1]
    channels = keep = index = scale = None
    columns = -(-outliers // 16) * 16
    if recipe.branch:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
        channels = order[:outliers].to(x.device)
        step = BRANCH_COLUMNS[recipe.branch]
        index = torch.full((-(-columns // step) * step,), -1).int().to(x.device)
        index[: len(channels)] = channels.int()
        keep = sm90.outlier_mask(index, width)
    if recipe.activations == "nvfp4":
        scale = torch.tensor([divisor], device=x.device)
    gain, epsilon = norm or (None, 0.0)
    made = activation.quantize_tokens(
        x,
        keep,
        index,
        scale,
        recipe.activations,
        recipe.rule,
        recipe.branch == "fp8",
        recipe.hadamard,
        gated,
        gain,
        epsilon,
    )
    source = activation.source_by_torch(x, gated, norm)
    wanted = activation.by_torch(source, recipe, channels, columns, scale)
    return tuple(operands(o, recipe, width, len(x)) for o in (made, wanted))  # type: ignore[return-value]


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where bits are equal, or both are NaN (whose bits mean nothing)."""
    if a.dtype == torch.uint8:  # E4M3
        return (a == b) | ((a & 127) == 127) & ((b & 127) == 127)
    bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return (a.view(bits) == b.view(bits)) | a.isnan() & b.isnan()


def check_equal(pair: tuple[Operands, Operands], what: object = None) -> None:
    """Bit for bit."""
    made, wanted = pair
    for name in ("scales", "branch", "main"):
        a, b = getattr(made, name), getattr(wanted, name)
        assert a.shape == b.shape
        wrong = (~same(a, b)).nonzero()
        assert not len(wrong), (what, name, len(wrong), wrong[:3].tolist())


def check_near(pair: tuple[Operands, Operands], most: float, what: object = None) -> None:
    """A number may fall to a code's neighbour: rarely."""
    made, wanted = pair
    assert (~same(made.scales, wanted.scales)).any(1).float().mean() <= most, what
    assert torch.equal(made.main.isnan(), wanted.main.isnan()), what
    a, b = made.main.nan_to_num(0), wanted.main.nan_to_num(0)
    assert (a != b).float().mean() <= most, (what, (a != b).sum())
    assert (a.float() - b.float()).norm() < most**0.5 * b.float().norm(), what
    if made.branch.numel():
        assert (~same(made.branch, wanted.branch)).float().mean() <= 10 * most, what


@cache
def rows(tokens: int, width: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Ordinary rows, and one each of what is not: of every eight, from the `first` on."""
    generator = torch.Generator().manual_seed(width + 31 * tokens + first)
    x = torch.randn(tokens, width, generator=generator)
    x *= torch.exp2(2 * torch.randn(1, width, generator=generator))
    bits = torch.randint(-(1 << 15), 1 << 15, (tokens, width), generator=generator).short()
    fraction = 1 << (10 if dtype == torch.float16 else 7)
    for i in range(tokens):
        place = (7 * i + 3) % width
        match (i + first) % 8:
            case 1:  # anything
                x[i] = bits[i].view(dtype).float()
            case 2:  # anything finite
                x[i] = bits[i].view(dtype).float().nan_to_num(0, 0, 0)
            case 3:  # subnormal
                x[i] = (bits[i] % fraction).view(dtype).float()
            case 4:  # between two codes, often
                x[i] = (bits[i] % 97 - 48) / 8 * 2.0 ** (bits[i, 0] % 9 - 4)
            case 5:
                x[i] = 0
            case 6:
                x[i, place] = torch.nan
            case 7:
                x[i, place] = -torch.inf
    return x.to(dtype)


def ordinary(tokens: int, width: int) -> Tensor:
    """Rows without extremes but a NaN and an infinity past the eighth."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=generator)
    x *= torch.exp2(torch.randn(1, width, generator=generator))
    x[8:9, 5], x[9:10, -1] = torch.nan, torch.inf
    return x.bfloat16()


def test_arguments_mirror_the_kernels() -> None:
    source = Path(activation.__file__).with_suffix(".cuh").read_text()
    body = source.split("struct WideActivationArguments {")[1].split("};")[0]
    lines = [re.sub(r"//.*", "", line).strip(" ;") for line in body.splitlines()]
    declared = [line.rsplit(" ", line.count(",") + 1) for line in lines if line]
    names = [name.strip("*, ") for _, *found in declared for name in found]
    fields = activation.WideActivationArguments._fields_
    assert names == [name for name, *_ in fields]
    pointers = [name for name, kind in fields if kind is ctypes.c_void_p]
    assert len(pointers) == sum("*" in line for line in lines)


def test_each_form_of_activations_has_a_source() -> None:
    names = [source.name for source in generate.sources("sm_90a")]
    assert names.count("sm90_wide_activation") == 2
    assert "__half, kMxfp8" in sm90_tiles.wide_activation_text("fp16", "mxfp8")


def test_what_the_kernel_does_not_know_is_left_to_torch() -> None:
    scale = torch.ones(1)
    assert Recipe("nvfp4", "even", 32, "fp8").has_kernel(scale)
    assert not Recipe("nvfp4", "even", 32, "fp8").has_kernel(None)
    assert not Recipe("nvfp4", "even", 96, None).has_kernel(scale)
    assert not Recipe("nvfp4", "even", 1024, None).has_kernel(scale)
    assert Recipe("mxfp8", "rceil", 0, None).has_kernel(None)
    assert not Recipe("mxfp8", "mse", 0, None).has_kernel(None)


@pytest.mark.parametrize("formats", [("nvfp4", "nvfp4"), ("mxfp8", "mxfp8")])
@pytest.mark.parametrize("branch", BRANCHES)
def test_fake_kernels_give_shapes_and_types(
    formats: tuple[str, str], branch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = wide_work(formats, 160, (70, 6), branch)
    site = [wide_layer(task, n)[0] for n in task.outputs]
    module = sm90_wide.WideLinear(task, site)
    x = torch.randn(17, 160).bfloat16()
    wanted = [module.quantize(x), module.quantize(torch.cat([x, x], 1), gated=True)]
    wanted.append(module.quantize(x, norm=(x[0], 1e-6)))
    monkeypatch.setattr(sm90_wide, "on_gpu", lambda x: True)
    module, x = module.to("meta"), x.to("meta")
    made = [module.quantize(x), module.quantize(torch.cat([x, x], 1), gated=True)]
    made.append(module.quantize(x, norm=(x[0], 1e-6)))
    for a, b in zip(made, wanted, strict=True):
        assert [t.shape for t in a[:2]] == [t.shape for t in b[:2]]
        assert [t.dtype for t in a[:2]] == [t.dtype for t in b[:2]]
        assert a[2] == b[2] == 17


def test_gates_and_norms_without_a_kernel_are_torchs() -> None:
    task = wide_work(("nvfp4", "nvfp4"), 96, (8,), "fp8")
    module = sm90_wide.WideLinear(task, [wide_layer(task, 8)[0]])
    gate, up = torch.randn(2, 3, 96).bfloat16()
    made = module.quantize(torch.cat([gate, up], 1), gated=True)
    wanted = module.quantize(torch.nn.functional.silu(gate) * up)
    assert torch.equal(made[0], wanted[0])
    x = torch.nn.functional.rms_norm(gate.double(), (96,), eps=1e-3)
    made, wanted = (
        module.quantize(gate, norm=(up[0].abs(), 1e-3)),
        module.quantize(up[0].abs() * x.bfloat16()),
    )
    assert (made[0] != wanted[0]).float().mean() < 1e-2


def test_the_kernel_compiles_without_spills(built) -> None:
    log = built(sm90_tiles.wide_activation_text("bf16", "nvfp4"))
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert len(spills) == 10
    assert not any(spills)


# ---- on the GPU


def needs_hopper() -> None:
    """Compiles what these tests launch, and no GEMMs."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")


SIZES = [(1, 80), (3, 4096), (64, 12288), (65, 4096), (193, 28672), (800, 4096), (9, 28672)]


@pytest.mark.gpu
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_gives_torchs_bits(
    activations: str, branch: str | None, dtype: torch.dtype
) -> None:
    needs_hopper()
    recipe = Recipe(activations, "even", 0, branch)
    for tokens, width in SIZES:
        width += 16 * (activations == "mxfp8" and width % 32 > 0)
        for first in range(8 if tokens < 8 else 1):
            for divisor in (37.5, 448.0, 3e-7) if tokens < 64 else (37.5,):
                x = rows(tokens, width, dtype, first).to("cuda")
                check_equal(both(x, recipe, divisor), (tokens, width, first, divisor))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["floor", "even4", "ceil", "rceil"])
def test_scale_rules_on_the_gpu(rule: str) -> None:
    needs_hopper()
    for branch in BRANCHES:
        x = rows(40, 1056, torch.bfloat16).to("cuda")
        check_equal(both(x, Recipe("mxfp8", rule, 0, branch)), branch)


@pytest.mark.gpu
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("hadamard", [32, 128, 512])
def test_rotations_on_the_gpu(activations: str, hadamard: int) -> None:
    needs_hopper()
    for tokens, width in ((1, 4096), (65, 12288), (800, 4608), (3, 28672)):
        for branch in BRANCHES:
            x = ordinary(tokens, width).to("cuda")
            pair = both(x, Recipe(activations, "even", hadamard, branch))
            check_near(pair, 2e-4, (tokens, width, branch))
            check_equal((Operands(pair[1].main, pair[0].branch, pair[0].scales), pair[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swiglu_on_the_gpu(activations: str, dtype: torch.dtype) -> None:
    needs_hopper()
    for tokens, width in ((1, 28672), (64, 12288), (193, 4096)):
        for branch in BRANCHES:
            x = torch.randn(tokens, 2 * width, device="cuda").to(dtype)
            pair = both(x, Recipe(activations, "even", 0, branch), gated=True)
            check_near(pair, 2e-3, (tokens, width, branch))


@pytest.mark.gpu
@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_on_the_gpu(activations: str, dtype: torch.dtype) -> None:
    """Bit for bit where float32 adds the squares exactly in any order; near otherwise."""
    needs_hopper()
    for tokens, width in ((1, 4096), (3, 16384), (65, 1024), (193, 8192), (2, 32768)):
        for branch in BRANCHES:
            recipe = Recipe(activations, "even", 0, branch)
            gain = (1 + torch.randn(width, device="cuda") / 4).to(dtype)
            x = torch.randint(-32, 33, (tokens, width), device="cuda").to(dtype)
            check_equal(both(x, recipe, norm=(gain, 1e-6)), (tokens, width, branch))
            x = torch.randn(tokens, width, device="cuda").to(dtype)
            pair = both(x, recipe, norm=(gain, 1e-6))
            # A last bit of the root mean square moves few codes, of a whole token.
            check_near(pair, 1e-2, (tokens, width, branch))


@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
def test_modules_gate_norm_and_compile_on_the_gpu(branch: str | None) -> None:
    needs_hopper()
    task = wide_work(("nvfp4", "nvfp4"), 576, (192, 60), branch, {"block": 32})
    site = [wide_layer(task, n, i, "cuda") for i, n in enumerate(task.outputs)]
    module = sm90_wide.WideLinear(task, [tensors for tensors, _ in site])
    for tokens in (1, 13):
        gate, up = torch.randn(2, tokens, 576, device="cuda").bfloat16()
        x = torch.nn.functional.silu(gate) * up
        y = module(x)
        wanted = torch.cat([expected(x) for _, expected in site], 1)
        assert relative_error(y, wanted) < 5e-3
        assert relative_error(module.gated(torch.cat([gate, up], 1)), y.double()) < 1e-2
        gain = up[0].abs()
        norm = activation.source_by_torch(x, False, (gain, 1e-6))
        assert relative_error(module.normed(x, gain, 1e-6), module(norm).double()) < 1e-2
        whole = torch.compile(module.normed, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x, gain, 1e-6), module.normed(x, gain, 1e-6))
        torch._dynamo.reset()
