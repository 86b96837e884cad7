"""What sink tokens should weigh in GPTQ's Hessians, and whether a few rows can say so: mean KL divergence by weight.

    python evals/benchmarks/sink_weight.py MODEL [--sink-map MAP] [--text FILE] [--heldout FILE] [--bits 4 3 2]
                                           [--weights 1 4 16 64 attention] [--select 4] [--rows 64]
                                           [--set calibration.rows=8 ...] [--length 512]

Every line is one quantization of the whole model; all lines have the same size in bytes. A weight is a cap: a sink
token weighs as often as it is read, and at most that. "attention" has no cap. `--select` rows of the calibration text,
behind those that GPTQ is calibrated on, are what a line search would choose by; the held-out rows are of another text.
The last lines say what the search would have chosen, and what that loses or wins beside the weight 16.
"""

from __future__ import annotations

import argparse

import torch
from measure import sink_map_of

from sinkquant.evaluate.divergence import compare_rows
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

UNCAPPED = 1e9
"""More often than any token of a calibration text can be read."""
FIXED = "16"
"""The weight that a search has to beat."""


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map")
    parser.add_argument("--text")
    parser.add_argument("--heldout")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--weights", nargs="+", default=["1", "4", FIXED, "64", "attention"])
    parser.add_argument("--select", type=int, default=4, help="rows that a search would choose by")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer = load_tokenizer(folder)
    base = load_model(folder, torch.float32)
    settings = ["protect.channels=none", f"calibration.length={arguments.length}", "detect.super_weights=false",
                f"calibration.text={arguments.text or 'null'}", *arguments.set]
    recipe = Recipe().replace(settings)
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    decoder = Decoder.of(base)
    length = min(arguments.length, decoder.max_length)
    used = recipe.calibration.rows
    select = token_rows(tokenizer, read_text(arguments.text, "calibration"), used + arguments.select, length)[used:]
    held_out = token_rows(tokenizer, read_text(arguments.heldout, "evaluation"), arguments.rows, length)
    selectors = make_plan(decoder.shape(sink_map.model.name), sink_map, recipe.replace(
        [f"protect.sink_weight={UNCAPPED}"])).calibration.sinks
    for token, selector in zip((t for t in sink_map.tokens if t.kind != "learned"), selectors, strict=True):
        place = "any place" if token.position is None else token.position
        print(f"- {token.text or 'any token'} at {place}: read {selector.weight:.1f} times as often as it stands there")
    print("\n| bits | sink weight | KL, selection rows | held-out rows | less than weight 1 | 95 % interval |")
    print("|---:|---:|---:|---:|---:|---|", flush=True)
    for bits in arguments.bits:
        chosen: dict[str, float] = {}
        measured: dict[str, list[float]] = {}
        for weight in arguments.weights:
            cap = UNCAPPED if weight == "attention" else float(weight)
            model = load_model(folder, torch.float32)
            plan = make_plan(decoder.shape(sink_map.model.name), sink_map, recipe.replace(
                [f"weights.bits={bits}", f"protect.sink_weight={cap}"]))
            quantize(model, plan, tokenizer)
            found = compare_rows(base, model, torch.cat([select, held_out])).kl
            chosen[weight] = sum(found[:len(select)]) / len(select)
            measured[weight] = found[len(select):]
            gain, low, high = _less(measured, arguments.weights[0], weight, arguments.seed)
            mean = sum(measured[weight]) / len(held_out)
            print(f"| {bits} | {weight} | {chosen[weight]:.5f} | {mean:.5f} | {gain:.5f} | {low:.5f} to {high:.5f} |",
                  flush=True)
        if FIXED in measured:
            best = min(chosen, key=lambda weight: chosen[weight])
            gain, low, high = _less(measured, FIXED, best, arguments.seed)
            print(f"\n{bits} bits: the selection rows choose {best}; on the held-out rows that is {gain:.5f} nats less "
                  f"than {FIXED} ({low:.5f} to {high:.5f})\n", flush=True)


def _less(measured: dict[str, list[float]], than: str, weight: str, seed: int) -> tuple[float, float, float]:
    """How much less one weight loses than another, with the interval."""
    ones = [1.0] * len(measured[weight])
    return paired_difference("kl", (measured[than], ones), (measured[weight], ones), 2000, seed)


if __name__ == "__main__":
    main()
