"""What a budget of average input bits leaves, by measured sensitivities and by a rule that spares down projections:
mean KL divergence from the unquantized model on held-out rows, with paired bootstrap intervals.

    python evals/benchmarks/input_bits.py MODEL --sink-map MAP --recipe nvfp4-sink --bits 4 5 6 8 16 [--rule]
                                          [--text FILE] [--heldout NAME=FILE] [--rows 12] [--set KEY=VALUE ...]
                                          [--sensitivity FILE.json] [--lines FILE.jsonl]

Bits 16: the weights alone. `--rule`: also inputs of all down projections in 16 bits, all others in the recipe's format.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import Lines, held_out_texts, table

from sinkquant.artifacts import SinkMap
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import accept_edited, make_plan
from sinkquant.policy.input_bits import average_bits
from sinkquant.recipe import Recipe
from sinkquant.sensitivity import find_sensitivity


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", type=Path, required=True)
    parser.add_argument("--recipe", default="nvfp4-sink")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 5, 6, 8, 16])
    parser.add_argument("--rule", action="store_true")
    parser.add_argument("--text")
    parser.add_argument("--heldout", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--sensitivity", type=Path, help="kept here, and taken from here")
    parser.add_argument("--lines", type=Path)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    recipe = Recipe.load(arguments.recipe).replace([f"calibration.text={arguments.text or 'null'}",
                                                    *arguments.settings])
    sink_map, opened = SinkMap.load(arguments.sink_map), open_model(folder)
    shape = Decoder.of(opened).shape(arguments.model)
    texts = held_out_texts(arguments.heldout, tokenizer, arguments.rows,
                           min(arguments.length, Decoder.of(base).max_length))
    found = find_sensitivity(opened, tokenizer, sink_map, recipe.replace(["activations.bits=16"]),
                             arguments.sensitivity)
    lines = Lines(arguments.lines)
    for bits in arguments.bits:
        settings = ["activations.format=16-bit"] if bits == 16 else [f"activations.bits={bits}"]
        plan = make_plan(shape, sink_map, recipe.replace(settings), None if bits == 16 else found)
        lines.measure({"recipe": arguments.recipe, "inputs": f"{bits:g} bits, measured"}, folder, base, plan,
                      tokenizer, texts)
    if arguments.rule:
        plan = make_plan(shape, sink_map, recipe)
        plan.modules = {name: decision.model_copy(update={"activations": "16-bit", "activation_scale": None})
                        if name.endswith("down_proj") else decision for name, decision in plan.modules.items()}
        average = average_bits({name: one.activations for name, one in plan.modules.items()}, shape)
        lines.measure({"recipe": arguments.recipe, "inputs": f"{average:.3g} bits, down projections spared"}, folder,
                      base, accept_edited(plan, shape), tokenizer, texts)
    print(table(lines.lines, ["recipe"]))


if __name__ == "__main__":
    main()
