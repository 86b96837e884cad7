"""Predicted against measured: budgets of the whole file are solved for, carried out in memory and measured.

    python evals/benchmarks/forecast.py MODEL [--recipe w5-file-budget] [--sink-map MAP] [--sensitivity FILE]
                                        [--megabytes 80 90 ...] [--text NAME=FILE ...] [--held-out 12]
                                        [--set KEY=VALUE ...] [--lines FILE.jsonl]

Without --megabytes ten budgets are taken, evenly spaced in bytes between the smallest checkpoint that the solver can
make and the first that is predicted to lose less than a thousandth of a nat. The table has both losses, their ratio,
and the bytes that were asked for and that came of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import RESAMPLES, Line, Lines, held_out_texts, sink_map_of

from sinkquant import Recipe, Sensitivity
from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.evaluate import paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_frontier, make_plan
from sinkquant.sensitivity import find_sensitivity

BUDGETS = 10
LEAST = 1e-3
"""Nats per token below which there is nothing to tell apart."""


def evenly(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, costs: Sensitivity) -> list[float]:
    """Ten budgets in megabytes."""
    solved = [point for point in make_frontier(shape, sink_map, recipe, costs, 60).points if point.kind == "solved"]
    first = solved[0].bytes
    last = next((point.bytes for point in solved if point.kl < LEAST), solved[-1].bytes)
    return [round((first + (last - first) * (step + 1) / BUDGETS) / 1e6, 2) for step in range(BUDGETS)]


def table(lines: list[Line]) -> str:
    """Markdown."""
    rows = [["text", "MB asked for", "bytes", "predicted", "measured", "95 % interval", "predicted / measured"],
            ["---", *["---:"] * 6]]
    for line in lines:
        ones, zeros = [1.0] * len(line.kl), [0.0] * len(line.kl)
        mean, low, high = paired_difference("kl", (line.kl, ones), (zeros, ones), RESAMPLES, 0)
        predicted = float(line.labels["predicted"])
        rows.append([line.labels.get("text", "packaged"), line.labels["MB"], f"{line.size:,}", f"{predicted:.5f}",
                     f"{mean:.5f}", f"{low:.5f} to {high:.5f}", f"{predicted / mean:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="w5-file-budget")
    parser.add_argument("--megabytes", type=float, nargs="*", default=[])
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--sensitivity", type=Path, help="taken from this file, or written there")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--held-out", type=int, default=12, help="held-out rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--lines", type=Path, help="keep what was measured here")
    arguments = parser.parse_args()
    folder, recipe = resolve(arguments.model), Recipe.load(arguments.recipe).replace(arguments.set)
    base, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    stored = open_model(folder)
    shape = Decoder.of(stored).shape(arguments.model)
    costs = find_sensitivity(stored, tokenizer, sink_map, recipe, arguments.sensitivity)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    lines = Lines(arguments.lines)
    for budget in arguments.megabytes or evenly(shape, sink_map, recipe, costs):
        plan = make_plan(shape, sink_map, recipe.replace([f"budget.megabytes={budget}"]), costs)
        labels = {"MB": f"{budget:g}", "predicted": f"{plan.predicted['kl']:.6g}"}
        lines.measure(labels, folder, base, plan, tokenizer, texts, plan.weight_bytes)
    print(table(lines.lines))


if __name__ == "__main__":
    main()
