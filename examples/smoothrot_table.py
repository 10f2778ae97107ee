"""Five ways to choose smoothing scales for the input of down_proj, compared on one model.

    python examples/smoothrot_table.py MODEL --data wikitext -o smoothrot

The experiment of "trainable SmoothRot" (2606.09927): the input of every down_proj is divided by a
scale per channel (the weight multiplied), rotated by a Hadamard, and both are rounded to 4 bits.

    smoothrot   s = max|x|^0.5 / max|w|^0.5                   the baseline
    alpha       the exponent, one for all layers
    quantile    a quantile of |x| in place of the maximum, one for all layers
    joint       exponent and quantile, one pair for all layers
    learned     s by gradient, each layer its own

Windows of text are split 64/16/20: scales are fitted on the first part, chosen on the second and
reported on the third. Every layer's results are kept in the output folder, so an interrupted run
continues; delete the folder to begin anew. Prints the table; writes table.json and table.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit import console
from quantkit.calibrate.layerwise import choose_device
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve
from quantkit.data.tokens import load_tokens
from quantkit.model.block import BlockRunner
from quantkit.model.families import describe
from quantkit.model.sites import read_weight
from quantkit.transforms.hadamard import largest_size
from quantkit.transforms.learned import Training, learn
from quantkit.transforms.observe import observe
from quantkit.transforms.scales import (
    ALPHAS,
    BEST,
    QUANTILES,
    Problem,
    floored_quantile,
    quantiles_of,
)
from quantkit.transforms.simulate import Simulation, output_error

POLICIES = ("none", "smoothrot", "alpha", "quantile", "joint", "learned")
Pair = tuple[float, float]  # alpha, quantile
Grid = dict[int, dict[Pair, float]]  # by layer


@dataclass(frozen=True)
class Layer:
    """What one down_proj reads and holds: tokens to fit, to choose and to report on [n, width]."""

    index: int
    fit: torch.Tensor
    choose: torch.Tensor
    report: torch.Tensor
    weight: torch.Tensor

    def problem(self, simulation: Simulation) -> Problem:
        """As the searches take it."""
        return Problem(self.fit, self.choose, self.weight, simulation)


def main() -> None:
    """Run the experiment."""
    arguments = parse()
    device = choose_device(arguments.device)
    checkpoint = open_checkpoint(resolve(arguments.model))
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    capture(checkpoint, arguments, device)
    tables = {}
    for recipe in arguments.recipes.split(","):
        tables[recipe] = experiment(arguments, device, recipe)
        print(f"\n{recipe}\n{shown(tables[recipe])}")
    (output / "table.json").write_text(json.dumps(tables, indent=1) + "\n")
    plot(tables, output / "table.png")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare smoothing scales on down_proj inputs.")
    parser.add_argument("model", help="a checkpoint folder or a Hub id")
    parser.add_argument("-o", "--output", type=Path, default=Path("smoothrot"))
    parser.add_argument("--data", default="wikitext", help="as for quantkit calibrate --data")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument(
        "--recipes",
        default="int4:full,mxfp4:32",
        help="rounding:Hadamard; int4 is per token and per channel, mxfp4 in blocks of 32",
    )
    parser.add_argument("--every", type=int, default=1, help="only every so many-th layer")
    parser.add_argument("--rule", default="even", help="of the MX scales")
    parser.add_argument("--steps", type=int, default=800, help="of learning, at most")
    parser.add_argument("--trial", type=int, default=60, help="steps that choose a start")
    parser.add_argument("--batch", type=int, default=512, help="tokens a learning step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def capture(checkpoint: Checkpoint, arguments: argparse.Namespace, device: torch.device) -> None:
    """Keep every down_proj's input as a file, split by windows."""
    layout = describe(checkpoint.config, checkpoint.tensors)
    folder = arguments.output / "inputs"
    folder.mkdir(exist_ok=True)
    dense = [s for s in layout.sites if s.kind == "mlp_out" and s.expert is None]
    wanted = [s for s in dense if s.layer % arguments.every == 0]
    keys = {s.key for s in wanted if not (folder / f"{s.layer}.safetensors").exists()}
    if not keys:
        return
    batch = load_tokens(arguments.data, checkpoint.path, samples=None, seq_len=arguments.seq_len)
    order = torch.randperm(len(batch.ids), generator=torch.Generator().manual_seed(arguments.seed))
    ids = batch.ids[order[: arguments.samples]]
    console.note(f"data: {batch.description}; {len(ids)} of them used")
    runner = BlockRunner(checkpoint, layout, device=device)
    with console.progress("capture", layout.n_layers) as progress:
        last = max(site.layer for site in wanted)
        for layer, inputs in observe(runner, ids, lambda s: s.key in keys, last):
            for seen in inputs:  # a fifth is held out; a fifth of the rest chooses
                first = len(seen.fit) // arguments.seq_len * 4 // 5 * arguments.seq_len
                parts = {"fit": seen.fit[:first], "choose": seen.fit[first:], "report": seen.held}
                parts["weight"] = read_weight(checkpoint, seen.site.linears[0])
                path = folder / f"{layer}.safetensors"
                save_file({k: v.cpu().clone() for k, v in parts.items()}, f"{path}.new")
                Path(f"{path}.new").rename(path)
            progress.advance()


def layers(output: Path, device: torch.device) -> Iterator[Layer]:
    """One layer after another, from the files."""
    for path in sorted((output / "inputs").glob("*.safetensors"), key=lambda p: int(p.stem)):
        parts = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        weight = parts.pop("weight").float()
        yield Layer(int(path.stem), weight=weight, **parts)


def experiment(arguments: argparse.Namespace, device: torch.device, recipe: str) -> dict[str, Any]:
    """All policies under one rounding: the settings chosen, errors by layer, means."""
    name = recipe.replace(":", "-")
    folder = arguments.output / name
    folder.mkdir(exist_ok=True)
    rounding, _, size = recipe.partition(":")
    width = next(layers(arguments.output, device)).weight.shape[1]
    hadamard = largest_size(width) if size == "full" else int(size) if size.isdigit() else None
    simulation = Simulation(rounding, rounding, arguments.rule, hadamard)

    grid: Grid = {}
    first = [(a, 1.0) for a in ALPHAS] + [(0.5, q) for q in QUANTILES if q < 1]
    for layer in layers(arguments.output, device):
        grid[layer.index] = scored(layer, simulation, first, folder)
        console.note(f"{name}: grid of layer {layer.index}")
    mean = mean_over(grid)
    alphas = sorted(ALPHAS, key=lambda a: mean[a, 1.0])
    quantiles = sorted(QUANTILES, key=lambda q: mean[0.5, q])
    second = [(a, q) for a in alphas[:BEST] for q in {*quantiles[:BEST], 1.0}]
    for layer in layers(arguments.output, device):
        grid[layer.index] |= scored(layer, simulation, second, folder)
    mean = mean_over(grid)
    pairs = {
        "smoothrot": (0.5, 1.0),
        "alpha": (alphas[0], 1.0),
        "quantile": (0.5, quantiles[0]),
        "joint": min(mean, key=lambda pair: mean[pair]),
    }

    training = Training(
        steps=arguments.steps, trial=arguments.trial, batch=arguments.batch, seed=arguments.seed
    )
    rows = []
    for layer in layers(arguments.output, device):
        path = folder / f"{layer.index}-final.json"
        key = json.loads(json.dumps([list(pairs.values()), vars(training)]))
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("key") != key:
            kept = {"key": key, "row": final(layer, simulation, pairs, training)}
            path.write_text(json.dumps(kept))
        rows.append(kept["row"])
        console.note(f"{name}: layer {layer.index} is learned")
    return {"settings": pairs, "layers": rows, "means": means(rows)}


def scored(
    layer: Layer, simulation: Simulation, pairs: list[Pair], folder: Path
) -> dict[Pair, float]:
    """Normalised error of each (alpha, quantile) on the tokens that choose; kept in a file."""
    path = folder / f"{layer.index}-grid.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    found = {(alpha, q): error for alpha, q, error in kept}
    if todo := [pair for pair in pairs if pair not in found]:
        problem = layer.problem(simulation)
        table = dict(zip(QUANTILES, quantiles_of(layer.fit, QUANTILES), strict=True))
        for alpha, q in todo:
            scale = problem.rule(floored_quantile(table[q], table[1.0]), alpha)
            found[alpha, q] = problem.error(scale, tokens=1024)
        path.write_text(json.dumps([[*pair, error] for pair, error in found.items()]))
    return found


def mean_over(grid: Grid) -> dict[Pair, float]:
    """Mean over layers of every pair that all layers have."""
    common = set.intersection(*(set(found) for found in grid.values()))
    return {pair: sum(found[pair] for found in grid.values()) / len(grid) for pair in common}


def final(
    layer: Layer, simulation: Simulation, pairs: dict[str, Pair], training: Training
) -> dict[str, Any]:
    """Raw and normalised error of every policy on the tokens reported on."""
    problem = layer.problem(simulation)
    scales: dict[str, torch.Tensor | None] = {"none": None}
    for policy, (alpha, q) in pairs.items():
        at_q, top = quantiles_of(layer.fit, (q, 1.0))
        scales[policy] = problem.rule(floored_quantile(at_q, top), alpha)
    learned = learn(problem, {"one": None, "joint": scales["joint"]}, training)
    scales["learned"] = learned.scale
    row: dict[str, Any] = {"layer": layer.index, "start": learned.start, "steps": learned.steps}
    for policy, scale in scales.items():
        raw, relative = output_error(layer.report, layer.weight, simulation, scale)
        row[policy] = {"raw": raw, "normalised": relative}
    return row


def means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean errors over selected and all layers, and the change against SmoothRot in per cent.

    Selected, as in the paper: three critical layers (largest error under the baseline) and two
    normal ones (around the median).
    """
    order = sorted(rows, key=lambda row: -row["smoothrot"]["raw"])
    middle = len(order) // 2
    selected = order[:3] + order[middle : middle + 2]
    found: dict[str, Any] = {"selected_layers": sorted(row["layer"] for row in selected)}
    for which, chosen in (("selected", selected), ("all", rows)):
        for measure in ("raw", "normalised"):
            mean = {p: sum(r[p][measure] for r in chosen) / len(chosen) for p in POLICIES}
            base = mean["smoothrot"]
            found[f"{which}_{measure}"] = {
                p: {"error": e, "change": 100 * (e / base - 1)} for p, e in mean.items()
            }
    return found


def shown(table: dict[str, Any]) -> str:
    """The means as text."""
    columns = ["selected_raw", "selected_normalised", "all_raw", "all_normalised"]
    rows = []
    for policy in POLICIES:
        setting = table["settings"].get(policy)
        rows.append([policy, "" if setting is None else f"{setting[0]:.3f}, {setting[1]:.4f}"])
        for column in columns:
            entry = table["means"][column][policy]
            rows[-1].append(f"{entry['error']:.4f} ({entry['change']:+.2f} %)")
    return console.table(["policy", "alpha, q", *(c.replace("_", " ") for c in columns)], rows)


def plot(tables: dict[str, Any], path: Path) -> None:
    """Draw the normalised error by layer and policy, one panel a recipe."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.warn(f"{path} is not drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(7 * len(tables), 4.5), layout="constrained")
    for i, (recipe, table) in enumerate(tables.items()):
        axes = figure.add_subplot(1, len(tables), i + 1)
        index = [row["layer"] for row in table["layers"]]
        for policy in POLICIES:
            values = [row[policy]["normalised"] for row in table["layers"]]
            axes.plot(index, values, marker="o", markersize=3, linewidth=1, label=policy)
        axes.set(title=recipe, xlabel="layer", ylabel="relative output error of down_proj")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    console.note(f"wrote {path}")


if __name__ == "__main__":
    main()
