"""Decode speed of a Qwen3-8B-shaped model with random weights: bfloat16, FP8 W8A8 and packed.

    python benchmarks/decode.py --batch 1,8,32 --json decode.json --markdown decode.md

Each model generates through transformers' own `generate` with a static cache; FP8 is torch's
per-token scaled_mm in place of every linear of a block. The compiled decoding step is transformers'
(torch.compile's CUDA graphs) or quantkit's (`quantkit.runtime.decode`, which `quantkit.load` gives
packed models); every model runs with both unless `--step` names one, or `own`, which is what a user
of the model gets, and the table says which.
Tokens per second count the steps after the first few, from CUDA events at each step; memory is
what the weights occupy on the GPU before generation, and that of the decoder blocks alone, without
embedding and output head. These two are bfloat16 in the `bf16` and the `fp8` model always, and in
the packed ones unless `--head mxfp8 --embedding mxfp8` packs them there; the table says which.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

from quantkit import console
from quantkit.kernels import dispatch
from quantkit.pack.layout import index_tensor, padded
from quantkit.pack.scheme import ENDS, Scheme, build, end_format
from quantkit.runtime.convert import replace_linears
from quantkit.runtime.decode import install
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.norm import SiteNorm

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
WARM_STEPS = 24  # the first steps compile, capture and fill caches
KINDS = ("bf16", "fp8", "w4a4", "osc")
STEPS = ("transformers", "quantkit")
OWN_STEP = {"bf16": STEPS[0], "fp8": STEPS[0], "w4a4": STEPS[1], "osc": STEPS[1]}


class Fp8Linear(nn.Module):
    """torch's W8A8: E4M3 weights with a scale a row, activations quantized per token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shape = (linear.out_features, linear.in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"))
        self.register_buffer("scale", torch.empty(1, shape[0], device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(-1, keepdim=True).float() / 448
        codes = (rows / scale).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            codes,
            self.weight.T,
            scale_a=scale,
            scale_b=self.scale,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.unflatten(0, x.shape[:-1])


def scheme_of(kind: str, config: Any, head: str | None, embedding: str | None) -> Scheme:
    """MXFP4 everywhere, or the dual-path scheme with one outlier channel in each 32."""
    ends = (
        None if head is None else end_format(head, "--head"),
        None if embedding is None else end_format(embedding, "--embedding"),
    )
    if kind == "w4a4":
        return build("mxfp4").with_ends(*ends)
    widths = {
        "attn_in": config.hidden_size,
        "attn_out": config.num_attention_heads * config.head_dim,
        "mlp_in": config.hidden_size,
        "mlp_out": config.intermediate_size,
    }
    scheme = build("osc", group=32, mlp_out="mxfp4")
    sites = {
        name: replace(site, outliers=padded(widths[name] // 32)) if site.branch else site
        for name, site in scheme.sites.items()
    }
    return replace(scheme, sites=sites).with_ends(*ends)


def random_model(
    kind: str,
    layers: int,
    device: torch.device,
    head: str | None = None,
    embedding: str | None = None,
) -> Any:
    """A model on `device` whose weights are random in the format of `kind`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**QWEN3_8B, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    if kind == "fp8":
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(model.model.layers.get_submodule(parent), leaf, Fp8Linear(module))
    elif kind != "bf16":
        replace_linears(model, scheme_of(kind, config, head, embedding), torch.bfloat16)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "rotary_emb" not in name:
            fill(name.rpartition(".")[2], tensor.data, generator)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.format.branch:
            channels = torch.arange(0, module.in_features, 32)
            module.outlier_index.copy_(index_tensor(channels, module.format.outliers))
    install(model)  # as loading a packed checkpoint does
    return model


def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Random contents that keep activations of ordinary size."""
    if name == "weight_packed":
        tensor.random_(0, 256, generator=generator)
    elif name == "weight_scale" and tensor.dtype == torch.uint8:
        tensor.fill_(127 - 7)  # 2^-7: rows of standard deviation about 0.02
    elif name == "outlier_index":
        tensor.fill_(-1)
    elif name == "scale":
        tensor.fill_(0.02)
    elif tensor.dtype == torch.float8_e4m3fn:
        for rows in tensor.split(1024):  # a whole float32 copy would be four times the weight
            rows.copy_(torch.randn(rows.shape, device=rows.device, generator=generator))
    else:
        tensor.normal_(0, 0.02, generator=generator)


class StepClock:
    """A stopping criterion that never stops: it records a CUDA event after every step."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step_ms(self) -> float:
        """Mean milliseconds of a step, the warm ones."""
        torch.cuda.synchronize()
        steps = len(self.events) - 1 - WARM_STEPS
        return self.events[WARM_STEPS].elapsed_time(self.events[-1]) / steps


def decode(model: Any, batch: int, prompt: int, steps: int, step: str = "quantkit") -> float:
    """Milliseconds of a decoding step of `generate` at `batch` sequences, a step of `step`'s."""
    from transformers import StoppingCriteriaList

    os.environ["QUANTKIT_DECODE"] = step
    tokens = torch.randint(0, 1000, (batch, prompt), device=model.device)
    clock = StepClock()
    with torch.no_grad():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=steps + WARM_STEPS,
            do_sample=False,
            cache_implementation="static",
            stopping_criteria=StoppingCriteriaList([clock]),
            eos_token_id=None,
            pad_token_id=0,
        )
    if step == "quantkit" and model.get_compiled_call.reason:
        raise RuntimeError(f"transformers' step ran: {model.get_compiled_call.reason}")
    return clock.step_ms()


def measure(
    kind: str, options: argparse.Namespace, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Build one model, run every batch size into `found`, which is saved as it grows, free it."""
    device = torch.device("cuda")
    dispatch.forget()
    before = torch.cuda.memory_allocated()
    model = random_model(kind, options.layers, device, options.head, options.embedding)
    for module in model.modules():
        if isinstance(module, SiteNorm) and options.separate_norms:
            module.site = None
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=device))  # packed linears prepare
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated() - before
    ends = {"embedding": model.model.embed_tokens, "head": model.lm_head}
    held = {name: bytes_on_gpu(module) for name, module in ends.items()}
    found |= {"weights_bytes": weights, "blocks_bytes": weights - sum(held.values())}
    found |= {f"{name}_bytes": size for name, size in held.items()}
    found["ends"] = ", ".join(f"{name} {words(module)}" for name, module in ends.items())
    steps = [OWN_STEP[kind] if step == "own" else step for step in options.step]
    found |= {"kernels": dispatch.summary(), "steps": {step: {} for step in steps}}
    for step in steps:
        for batch in options.batch:
            torch._dynamo.reset()
            ms = decode(model, batch, options.prompt, options.steps, step)
            found["steps"][step][batch] = {"step_ms": ms, "tokens_per_s": batch / ms * 1e3}
            console.note(
                f"{kind}, {step}, batch {batch}: {ms:.3f} ms, {batch / ms * 1e3:.0f} tokens/s"
            )
            save()
    if options.profile:
        found["profile"] = profile(model, options, steps[-1])
    del model
    gc.collect()
    torch.cuda.empty_cache()


def bytes_on_gpu(module: nn.Module) -> int:
    """What a module holds on the GPU: a prepared linear its kernel's layout alone."""
    tensors = [*module.parameters(), *module.buffers()]
    if isinstance(module, QuantLinear):
        probe = torch.empty(1, module.in_features, dtype=torch.bfloat16, device="cuda")
        kernel = module.site.kernel(probe)
        tensors += [] if kernel is None else [*kernel.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)


def words(module: nn.Module) -> str:
    """The format of an embedding or a head."""
    return module.format.weights if hasattr(module, "format") else "bf16"


def profile(model: Any, options: argparse.Namespace, step: str) -> list[dict[str, Any]]:
    """Where a step's GPU time goes at the first batch size: kernels by total time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as trace:
        decode(model, options.batch[0], options.prompt, 8, step)
    rows = sorted(trace.key_averages(), key=lambda row: -row.self_device_time_total)[:15]
    return [
        {"kernel": row.key[:90], "calls": row.count, "us": row.self_device_time_total}
        for row in rows
    ]


def markdown(headers: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def as_text(found: dict[str, Any], layout: Callable[..., str] = console.table) -> str:
    """Tokens a second; ratios to bfloat16 and FP8 with transformers' step, and with the same."""
    models = found["models"]

    def ratio(kind: str, step: str, batch: int, rate: float) -> str:
        cell = models.get(kind, {}).get("steps", {}).get(step, {}).get(batch)
        return f"{rate / cell['tokens_per_s']:.2f}" if cell else "-"

    rows = []
    for kind, model in models.items():
        memory = []
        for part in ("weights_bytes", "blocks_bytes"):
            share = f"{model[part] / models['bf16'][part]:.2f}" if "bf16" in models else "-"
            memory += [f"{model[part] / 1e9:.2f}", share]
        for step, cells in model["steps"].items():
            for batch, cell in cells.items():
                rate = cell["tokens_per_s"]
                ratios = [ratio(base, STEPS[0], batch, rate) for base in ("bf16", "fp8")]
                ratios += [ratio(base, step, batch, rate) for base in ("bf16", "fp8")]
                speed = [f"{cell['step_ms']:.3f}", f"{rate:.0f}"]
                rows.append([kind, model["ends"], step, batch, *speed, *ratios, *memory])
    headers = ["model", "outside the blocks", "step", "batch", "ms a step", "tokens/s"]
    headers += ["x bf16", "x fp8", "x bf16, same step", "x fp8, same step"]
    headers += ["GB", "of bf16", "blocks GB", "of bf16"]
    return f"{found['device']}\n\n{layout(headers, rows)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--layers", type=int, default=QWEN3_8B["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument(
        "--step",
        type=lambda text: text.split(","),
        default=list(STEPS),
        help="whose, of both; own: a user's",
    )
    for end in ("--head", "--embedding"):
        parser.add_argument(end, choices=ENDS, help="its format in the packed models, not bf16")
    parser.add_argument(
        "--separate-norms", action="store_true", help="leave RMSNorm to torch, to compare"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": options.layers,
        "separate_norms": options.separate_norms,
        "head": options.head,
        "embedding": options.embedding,
        "models": {},
    }

    def save() -> None:
        if options.json:  # what is there so far outlives an interruption
            options.json.write_text(json.dumps(found, indent=2) + "\n")

    for kind in options.models:
        measure(kind, options, found["models"].setdefault(kind, {}), save)
    save()
    if options.markdown:
        options.markdown.write_text(as_text(found, markdown) + "\n")
    print(as_text(found))


if __name__ == "__main__":
    main()
