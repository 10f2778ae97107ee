"""Pack one calibrated checkpoint in many ways and compare what each costs and loses.

    quantkit calibrate model/ --data wikitext
    python examples/compare_schemes.py model-calibrated --data wikitext

prints true bits per weight, perplexity, and excess loss with its standard error for round to
nearest under three scale rules, NVFP4, and OSC with its variants, all on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from quantkit import console
from quantkit.checkpoint.step import Target
from quantkit.evaluate.run import Text, evaluate, prepare
from quantkit.pack.job import PackOptions
from quantkit.pack.pack import pack

CHOICES = {
    "mxfp4, floor": PackOptions("mxfp4", scale_rule="floor"),
    "mxfp4, even": PackOptions("mxfp4"),
    "mxfp4, rceil": PackOptions("mxfp4", scale_rule="rceil"),
    "nvfp4": PackOptions("nvfp4"),
    "osc, groups of 32": PackOptions("osc", group=32),
    "osc, groups of 64": PackOptions("osc", group=64),
    "osc, 4-bit mlp_out, groups of 32": PackOptions("osc", group=32, mlp_out="mxfp4"),
    "osc, 4-bit mlp_out, groups of 64": PackOptions("osc", group=64, mlp_out="mxfp4"),
}


def main() -> None:
    """Parse the command line, pack and evaluate every choice, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("checkpoint", help="a calibrated checkpoint")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="", help="only choices that contain this word")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rows, found = [], {}
    for name, packing in CHOICES.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory(dir=Path(options.checkpoint).parent) as folder:
            packed = pack(options.checkpoint, packing, Target(Path(folder) / "packed")).output
            text = Text(options.data, options.windows, options.seq_len)
            report = evaluate(prepare(packed, text=text, device=options.device))
        part = report["perplexity"]
        found[name] = {"bits_per_weight": report["bits_per_weight"], **part}
        if not rows and "original" in part:
            bits, before = report["original_bits_per_weight"], part["original"]
            rows.append(("original", f"{bits:.3f}", f"{before['perplexity']:.2f}", ""))
        excess = f"{part['excess_nll']:+.4f} ± {part['excess_nll_stderr'] or 0:.4f}"
        bits, after = report["bits_per_weight"], part["packed"]
        rows.append((name, f"{bits:.3f}", f"{after['perplexity']:.2f}", excess))
        print(" ".join(rows[-1]), file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(console.table(("scheme", "bits/weight", "perplexity", "excess nats/token"), rows))


if __name__ == "__main__":
    main()
