"""Measure a model that another tool quantized, for compare_schemes.py --peers; needs no quantkit.

Runs in the environment of that tool, on the model as it is in memory after quantizing, so that it
is the tool's own arithmetic that is measured:

    from peer_losses import record

    model = AutoModelForCausalLM.from_pretrained("model", dtype="bfloat16")
    # llm-compressor: oneshot(model=model, recipe=..., dataset=...)
    # Model Optimizer: modelopt.torch.quantization.quantize(model, config, forward_loop)
    record(model, "llm-compressor, MXFP4, GPTQ", 4.25, "exact.json", "peers.json")

The tokens and the unquantized model's losses come from quantkit's side, once:

    python examples/peer_losses.py model exact.json --tokens tokens.safetensors:held

`peers.json` is a list of objects with `name`, `bits` (per weight, everything on disk), `excess` and
`stderr` (nats per token over the unquantized model), and `digest` (of the tokens).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of every window of ids [n, seq], in nats: float64 [n]."""
    device, found = next(model.parameters()).device, []
    for window in ids:
        window = window[None].to(device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        found.append(loss.double().mean().cpu())
    return torch.stack(found)


def record(model: Any, name: str, bits: float, exact: str | Path, peers: str | Path) -> None:
    """Measure `model` on the tokens of `exact` and add its row to the file `peers`."""
    before = json.loads(Path(exact).read_text())
    found = losses(model, torch.tensor(before["ids"]))
    excess = found - torch.tensor(before["losses"], dtype=torch.float64)
    row = {
        "name": name,
        "bits": bits,
        "excess": float(excess.mean()),
        "stderr": float(excess.std()) / math.sqrt(len(excess)),
        "digest": before["digest"],
    }
    path = Path(peers)
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [other for other in rows if other["name"] != name] + [row]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def digest_of(ids: torch.Tensor) -> str:
    """What compare_schemes.py calls these tokens by."""
    data = ids.contiguous().numpy().tobytes()
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + data).hexdigest()


def main() -> None:
    """Write the tokens and the unquantized model's losses on them."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description="Tokens and exact losses for peers.")
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--tokens", required=True, help="FILE.safetensors:KEY, ids [n, seq]")
    options = parser.parse_args()
    file, _, key = options.tokens.rpartition(":")
    ids = load_file(file)[key].long()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    found = {"digest": digest_of(ids), "losses": losses(model, ids).tolist(), "ids": ids.tolist()}
    Path(options.output).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
