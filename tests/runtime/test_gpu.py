"""Packed models on a GPU: kernels against the reference, CUDA graphs, torch.compile, generate."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.formats import nvfp4
from quantkit.kernels import capability, dispatch, reference, sm90, sm90_wide
from quantkit.pack.layout import index_tensor
from quantkit.pack.rounding import round_weight
from quantkit.pack.scheme import build
from quantkit.pack.separate import branch_tensors, extended, rotated, separate
from quantkit.runtime.convert import replace_linears
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.norm import SiteNorm
from quantkit.runtime.site import prepare
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu
GROUP = 32


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QUANTKIT_KERNEL", raising=False)
    dispatch.forget()
    gpu = dispatch.capability(torch.device("cuda"))
    if isinstance(found := capability.find("mxfp4", "mxfp4", "bf16", gpu), str):
        pytest.skip(found)
    yield
    torch._dynamo.reset()
    gc.collect()  # results of a compiled model lie in its graphs' memory
    torch._inductor.cudagraph_trees.reset_cudagraph_trees()


def packed_model(
    branch: str | None, weights: str = "mxfp4", rotation: int = 0, device: str = "cuda"
) -> Any:
    """A small Qwen3 with 4-bit linears, one channel of each 32 in the branch or none."""
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=512, head_dim=64)
    model = model.to(torch.bfloat16)
    numbers = {name: module.weight.data for name, module in model.named_modules() if "proj" in name}
    scheme = build(weights, group=GROUP, branch=branch or "bf16", separated=branch is not None)
    columns = 32 if branch == "residual" else 16
    hadamard = {"block": rotation} if rotation else None
    sites = {
        kind: replace(fmt, outliers=columns if branch else 0, hadamard=hadamard)
        for kind, fmt in scheme.sites.items()
        if fmt is not None
    }
    replace_linears(model, replace(scheme, sites=sites), torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            fill(module, numbers[name].float())
    return model.to(device).eval()


def fill(module: QuantLinear, weight: Tensor) -> None:
    """Pack `weight` into a linear on the meta device."""
    tensors: dict[str, Tensor] = {}
    fmt, channels = module.format, torch.arange(3, weight.shape[1], GROUP)
    if fmt.branch:
        tensors["outlier_index"] = index_tensor(channels, fmt.outliers)
    if fmt.branch and not fmt.appended:
        weight, columns = separate(weight, channels)
        tensors |= branch_tensors(columns, channels, fmt)
    weight = rotated(weight, fmt)
    if fmt.appended:
        weight = extended(weight, channels, fmt)
    tensors |= round_weight(weight, fmt)
    if fmt.weights == "nvfp4":  # under powers of two, where the reference's operands are exact
        divisor = tensors["weight_global_scale"].log2().floor().exp2()
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        tensors |= dict(zip(names, nvfp4.quantize(weight, divisor), strict=True))
        tensors["input_global_scale"] = torch.tensor([128.0])
    assert set(tensors) == set(module.packed_names)
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)


def tokens(batch: int, length: int, device: str = "cuda") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (batch, length), generator=generator).to(device)


FORMATS = [
    ("mxfp4", None, 0),
    ("mxfp4", "bf16", 0),
    ("mxfp4", "residual", 0),
    ("nvfp4", "bf16", 0),
    ("nvfp4", "residual", 32),
    ("mxfp8", "bf16", 0),
]
FP8_BRANCHES = [("mxfp4", "fp8", 0), ("nvfp4", "fp8", 0), ("nvfp4", "fp8", 32)]


@pytest.mark.parametrize(("weights", "branch", "rotation"), FORMATS + FP8_BRANCHES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (4, 200)])
def test_every_linear_of_a_model_gives_what_its_numbers_say(
    weights: str,
    branch: str | None,
    rotation: int,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each on the input it has in the reference's forward, against float64."""
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")
    plain = packed_model(branch, weights, rotation)
    inputs: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        if isinstance(module, QuantLinear):
            keep = lambda _, args, name=name: inputs.update({name: args[0]})  # noqa: E731
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        plain(tokens(*shape))
        monkeypatch.delenv("QUANTKIT_KERNEL")
        dispatch.forget()
        model = packed_model(branch, weights, rotation)
        for name, x in inputs.items():
            member = plain.get_submodule(name)
            weight, channels = member.operands(torch.float32)
            divisor = member.packed().get("input_global_scale")
            operand = reference.input_operand(
                x.float(), member.format, member.site.rule, channels, divisor
            )
            want = operand.double() @ weight.double().T
            error = model.get_submodule(name)(x).double() - want
            rounding = want.bfloat16().double() - want
            # A rotated value between two codes may fall to the other: one here is 9e-4.
            moved = 1e-3 if rotation else 1e-4
            bound = max(1.8e-3 * want.norm(), rounding.norm() + moved * want.norm())
            assert error.norm() <= bound, name
    assert "reference" not in dispatch.summary(), dispatch.report()


# Not FP8 branches: FP8 sums differ from float32's by an ulp of bfloat16 in many places, which a
# random model of such precision makes very different logits of.
@pytest.mark.parametrize(("weights", "branch", "rotation"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (4, 200)])
def test_kernels_agree_with_the_reference(
    weights: str,
    branch: str | None,
    rotation: int,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = packed_model(branch, weights, rotation)
    ids = tokens(*shape)
    with torch.no_grad():
        got = model(ids).logits.float()
        assert "reference" not in dispatch.summary(), dispatch.report()
        monkeypatch.setenv("QUANTKIT_KERNEL", "reference")
        dispatch.forget()
        want = packed_model(branch, weights, rotation)(ids).logits.float()
        assert set(dispatch.summary()) == {"reference"}
    # Rounding of sums differs by an ulp of bfloat16, which moves a few activations to another code.
    difference = (got - want).norm() / want.norm()
    assert difference < 0.02, difference


@pytest.mark.parametrize(
    ("weights", "kernel"), [("mxfp4", sm90.ExactFoldLinear), ("nvfp4", sm90_wide.WideLinear)]
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (4, 200)])
def test_norms_inside_the_kernel_give_what_torchs_give(
    weights: str, kernel: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    normed = kernel.normed
    monkeypatch.setattr(kernel, "normed", lambda *args: calls.append(1) or normed(*args))
    model = packed_model("bf16", weights)
    ids = tokens(*shape)
    with torch.no_grad():
        got = model(ids).logits.float()
        assert len(calls) == 4
        for module in model.modules():
            if isinstance(module, SiteNorm):
                module.site = None
        want = model(ids).logits.float()
        assert len(calls) == 4
    # A sum of squares in another order moves few activations to another code.
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize(
    ("weights", "branch"), [("mxfp4", "bf16"), ("mxfp4", "residual"), ("nvfp4", "fp8")]
)
def test_a_cuda_graph_replays_the_same_bits(weights: str, branch: str) -> None:
    model = packed_model(branch, weights)
    ids = tokens(2, 1)
    with torch.no_grad():
        for _ in range(2):
            want = model(ids, use_cache=False).logits.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(ids, use_cache=False).logits
        got.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)
        ids.copy_(ids.flip(0))
        graph.replay()
        assert torch.equal(got, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("backend", "weights", "branch"),
    [
        ("cudagraphs", "mxfp4", "bf16"),
        ("inductor", "mxfp4", "bf16"),
        ("cudagraphs", "nvfp4", "fp8"),
    ],
)
def test_torch_compile_with_cuda_graphs(backend: str, weights: str, branch: str) -> None:
    """The same bits from torch's own operators; near where inductor rounds as they do.

    By itself it leaves out roundings to bfloat16 between operators, as in any model; here an ulp
    anywhere moves codes, and the logits of these random weights by a tenth.
    """
    model = packed_model(branch, weights)
    ids = tokens(2, 1)
    mode = "reduce-overhead" if backend == "inductor" else None
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True):
        want = model(ids, use_cache=False).logits.float()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, mode=mode)
        for _ in range(4):
            got = compiled(ids, use_cache=False).logits.float().clone()
    if backend == "cudagraphs":
        assert torch.equal(got, want)
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize(("weights", "branch"), [("mxfp4", "bf16"), ("nvfp4", "fp8")])
def test_generate_with_a_static_cache(weights: str, branch: str) -> None:
    model = packed_model(branch, weights)
    ids = tokens(2, 8)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        eager = model.generate(ids, attention_mask=mask, **options)
        static = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert static.shape == eager.shape == (2, 20)
    assert torch.equal(static[:, :9], eager[:, :9]), "the first token comes from the same prefill"
    assert "reference" not in dispatch.summary()


def test_the_packed_tensors_leave_the_gpu() -> None:
    model = packed_model(None)
    stored = [m for m in model.modules() if isinstance(m, QuantLinear)]
    size = sum(tensor.nbytes for module in stored for tensor in module.packed().values())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    prepare(model, torch.bfloat16)
    assert all(tensor.is_cpu for module in stored for tensor in module.packed().values())
    assert torch.cuda.memory_allocated() - before < size, "the layout is not a second copy"
