"""Train one small SwiGLU decoder: a baseline, with depth registers, or with registers and a sink.

Matched runs differ in nothing but the named choices: the same seed gives the same initial weights
of everything they share, the same windows in the same order and the same schedule.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from quantkit.model.depth_registers import MODEL_TYPE, DepthRegisterConfig, DepthRegisterForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training run."""

    registers: int = 0  # learned vectors per layer
    sink: bool = False  # a position with a learned key and a value of zero
    hinge: float = 0.0  # lambda of mean(relu(||r|| - tau)^2); norms are root mean squares
    hinge_on: str = "residual"  # residual | registers | both
    tau: float = 1.0
    hidden: int = 384
    layers: int = 12
    heads: int = 6
    kv_heads: int = 6
    intermediate: int = 1024
    sequence: int = 512
    batch: int = 64  # windows a step
    steps: int = 2400
    warmup: int = 150
    rate: float = 2e-3
    decay: float = 0.1
    seed: int = 0
    save_every: int = 500


def build(recipe: Recipe, vocabulary: int) -> DepthRegisterForCausalLM:
    """The model of a recipe; shared parameters are equal in every run of one seed."""
    config = DepthRegisterConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.sequence,
        tie_word_embeddings=True,
        num_registers=recipe.registers,
        attention_sink=recipe.sink,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = DepthRegisterForCausalLM(config)
    with torch.no_grad():  # by name, so that extra parameters shift no one else's draw
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            stable = int.from_bytes(name.encode(), "little") % (2**31 - 1)
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + stable)
            std = {"registers": 1.0, "sink_key": 0.1}.get(name.rsplit(".", 1)[-1], 0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * recipe.layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def windows(tokens: torch.Tensor, recipe: Recipe, step: int) -> torch.Tensor:
    """The token windows [batch, sequence + 1] of a step: epochs over shuffled windows."""
    per_epoch = (len(tokens) - 1) // recipe.sequence
    positions = torch.arange(step * recipe.batch, (step + 1) * recipe.batch)
    rows = []
    for epoch in torch.unique(positions // per_epoch).tolist():
        generator = torch.Generator().manual_seed(recipe.seed * 9973 + epoch)
        order = torch.randperm(per_epoch, generator=generator)
        rows.append(order[positions[positions // per_epoch == epoch] % per_epoch])
    starts = torch.cat(rows) * recipe.sequence
    return tokens[starts[:, None] + torch.arange(recipe.sequence + 1)].long()


def hinge(vectors: torch.Tensor, tau: float) -> torch.Tensor:
    """mean(relu(||r|| - tau)^2) over vectors [..., hidden], the norm as a root mean square."""
    norm = vectors.float().pow(2).mean(-1).add(1e-12).sqrt()
    return F.relu(norm - tau).pow(2).mean()


def loss_terms(
    model: DepthRegisterForCausalLM, ids: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy in nats a token, hinge penalty) of windows [batch, sequence + 1]."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    body = model.model
    hidden = body.embed_tokens(inputs)
    position = torch.arange(inputs.shape[1], device=ids.device)[None]
    rotary = body.rotary_emb(hidden, position)
    penalty = torch.zeros((), device=ids.device)
    for layer in body.layers:
        if recipe.hinge and recipe.hinge_on in ("registers", "both") and recipe.registers:
            penalty = penalty + hinge(layer.self_attn.registers, recipe.tau)
        hidden = layer(hidden, position_embeddings=rotary)
        if recipe.hinge and recipe.hinge_on in ("residual", "both"):
            penalty = penalty + hinge(hidden, recipe.tau)
    logits = model.lm_head(body.norm(hidden))
    entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    return entropy, penalty / recipe.layers


def save_state(path: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Durable training state: weights, optimizer moments and the step, replaced atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    partial = path.with_suffix(".partial")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, {"step": str(step)})
    partial.replace(path)


def load_state(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_state` wrote; returns the step to continue with."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"{key}.{name}"]
                # fused AdamW counts its steps on the device
                optimizer.state[parameter][key] = value.to(parameter.device)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def export(model: DepthRegisterForCausalLM, recipe: Recipe, path: Path, tokenizer: Path) -> None:
    """Save as bf16 safetensors: a plain Llama where nothing was added, else our model type."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    state = {k: v.detach().to(torch.bfloat16).cpu() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    if not (recipe.registers or recipe.sink):
        drop = ("num_registers", "attention_sink", "model_type", "architectures")
        config = {k: v for k, v in config.items() if k not in drop}
        plain: Any = LlamaForCausalLM(LlamaConfig(**config))
    else:
        config.pop("model_type")
        plain = DepthRegisterForCausalLM(DepthRegisterConfig(**config))
        assert plain.config.model_type == MODEL_TYPE
    plain = plain.to(torch.bfloat16)
    plain.load_state_dict(state)
    plain.save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token="<|endoftext|>")
    fast.save_pretrained(path)


def train(recipe: Recipe, corpus: Path, output: Path, device: str) -> dict[str, Any]:
    """Train and export to `output`; an interrupted run continues from its last saved state."""
    tokens = load_file(corpus)["train"].to(torch.int32)
    tokenizer = json.loads((corpus.parent / "tokenizer.json").read_text())
    vocabulary = len(tokenizer["model"]["vocab"])
    output.mkdir(parents=True, exist_ok=True)
    model = build(recipe, vocabulary).to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": others}]
    cuda = device.startswith("cuda")
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda
    )
    state, first = output / "state.safetensors", 0
    if state.exists():
        first = load_state(state, model, optimizer)
    terms: Any = torch.compile(loss_terms) if cuda else loss_terms
    log: list[dict[str, float]] = []
    start = time.time()
    for step in range(first, recipe.steps):
        warm = min(1.0, (step + 1) / recipe.warmup)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(step / recipe.steps * torch.pi)).item())
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * warm * (0.05 + 0.95 * cosine)
        ids = windows(tokens, recipe, step).to(device, non_blocking=True)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cuda):
            entropy, penalty = terms(model, ids, recipe)
        (entropy + recipe.hinge * penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step + 1 == recipe.steps:
            row = {"step": step, "loss": entropy.item(), "penalty": penalty.item()}
            log.append({**row, "seconds": round(time.time() - start, 1)})
            print(f"{output.name}: {log[-1]}", flush=True)
        if recipe.save_every and (step + 1) % recipe.save_every == 0 and step + 1 < recipe.steps:
            save_state(state, model, optimizer, step + 1)
    export(model, recipe, output, corpus.parent / "tokenizer.json")
    state.unlink(missing_ok=True)
    seen = recipe.steps * recipe.batch * recipe.sequence
    summary = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": seen,
        "epochs": round(seen / len(tokens), 2),
        "seconds": round(time.time() - start, 1),
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(summary, indent=1))
    return summary
