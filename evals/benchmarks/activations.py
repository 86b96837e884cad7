"""What rounded activations cost, and what it is worth to keep the sinks out of their ranges: mean KL divergence from
the unquantized model and perplexity on held-out rows, with paired bootstrap intervals.

    python evals/benchmarks/activations.py MODEL [--text FILE] [--heldout FILE] [--rows 32] [--set KEY=VALUE ...]
                                           [--weights 16 8 4] [--inputs int8 int6 int4]
                                           [--scales all exact dynamic exclude token token-exact block block-exact]
                                           [--lines FILE.jsonl]

Weights: 16 as they are (with the scales that calibration finds for 8), 8 with one scale per channel, fewer in groups of
64. Scales: "all" one stored scale per linear that reaches every token (the control), "dynamic" a scale per token where
the sinks would set the range, "exclude" a stored scale that leaves `<bos>` out, whose keys and values come from the
unquantized model, "token" a scale per token everywhere. Inputs in nvfp4 and mxfp4 have scales of their own: "block";
4-bit weights are then in the same format, by GPTQ. "exact", "token-exact" and "block-exact": the inputs of the detected
sinks are not rounded at all and reach no range, which no engine can do: the most that protecting them can be worth.
Scales that inputs do not have are passed over. "smooth, ..." is the same after SmoothQuant. int6 and int4 are
simulated; fp8 takes weights of 8 bits, which become FP8 as well, by rounding to nearest.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from measure import Lines, held_out_texts, table

from sinkquant.artifacts import SinkMap
from sinkquant.detect import detect
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_plan
from sinkquant.recipe import Recipe
from sinkquant.schemes import input_format
from sinkquant.sinks import SinkSelector

SCALES = {"all": ["activations.scale=tensor", "activations.sinks=all"],
          "dynamic": ["activations.scale=tensor", "activations.sinks=dynamic"],
          "exclude": ["activations.scale=tensor", "activations.sinks=exclude",
                      "kv_cache={key_bits: 16, value_bits: 16, group_size: 128, window: 512, prefix: bos}"],
          "token": ["activations.scale=token"]}
BLOCKS = {"block": ["activations.scale=group", "activations.sinks=all"]}
SCALES |= {f"smooth, {name}": [*asked, "weights.smooth=smoothquant"] for name, asked in SCALES.items()}
EXACT = {"exact": SCALES["all"], "token-exact": SCALES["token"], "block-exact": BLOCKS["block"]}
BLOCKS |= {"block-exact": BLOCKS["block"]}
SCALES |= BLOCKS | EXACT


def main() -> None:
    """Print the table as Markdown, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--heldout", nargs="*", default=[], metavar="NAME=FILE", help="default: the packaged text")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--weights", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--inputs", nargs="+", default=["int8", "int6", "int4"])
    parser.add_argument("--scales", nargs="+", default=list(SCALES)[:4], choices=list(SCALES))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=Path, help="keep what was measured here (measure.py)")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    recipe = Recipe().replace([f"calibration.text={arguments.text or 'null'}", "detect.super_weights=false",
                               *arguments.settings])
    sink_map = SinkMap.load(arguments.sink_map) if arguments.sink_map else detect(base, tokenizer, recipe=recipe)
    texts = held_out_texts(arguments.heldout, tokenizer, arguments.rows,
                           min(arguments.length, Decoder.of(base).max_length))
    lines, shape = Lines(arguments.lines), Decoder.of(open_model(folder)).shape(arguments.model)
    for bits, inputs, scale in itertools.product(arguments.weights, arguments.inputs, arguments.scales):
        size = input_format(inputs).group_size
        if (size is None) == (scale in BLOCKS):
            continue
        labels = {"weights": str(bits), "inputs": inputs, "scales": scale}
        weights = ["weights.bits=8", "weights.group_size=-1"] if bits >= 8 else [
            f"weights.bits={bits}", "weights.group_size=64"]
        if size is not None:
            weights = [f"weights.format={inputs}", f"weights.group_size={size}", "weights.bits=4"]
        if bits == 16 or inputs == "fp8":
            weights += ["weights.method=rtn", f"weights.scale_search={bits != 16}"]
        plan = make_plan(shape, sink_map, recipe.replace(
            [*weights, f"activations.format={inputs}", *SCALES[scale]]))
        if scale in EXACT:
            plan.calibration.ranges = "exclude"
        lines.measure(labels, folder, base, plan, tokenizer, texts, keep_weights=bits == 16,
                      exact=SinkSelector.of(sink_map.tokens) if scale in EXACT else None)
    print(table(lines.lines, ["weights", "inputs", "text"], arguments.seed))


if __name__ == "__main__":
    main()
