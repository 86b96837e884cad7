"""What sink tokens should weigh in GPTQ's Hessians: mean KL divergence by weight and bits, with paired intervals.

    python evals/benchmarks/sink_weight.py MODEL [--text FILE] [--heldout FILE] [--bits 4 3 2]
                                           [--weights 1 4 16 64 attention]

Every line is one quantization of the whole model; all lines have the same size in bytes. A weight is a cap: a sink
token weighs as often as it is read, and at most that. "attention" has no cap.
"""

from __future__ import annotations

import argparse

import torch

from sinkquant.detect import detect
from sinkquant.evaluate.divergence import row_divergences
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

UNCAPPED = 1e9
"""More often than any token of a calibration text can be read."""


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--heldout")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--weights", nargs="+", default=["1", "4", "16", "64", "attention"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer = load_tokenizer(folder)
    base = load_model(folder, torch.float32)
    settings = ["protect.channels=none", f"calibration.length={arguments.length}", "detect.super_weights=false",
                f"calibration.text={arguments.text or 'null'}"]
    sink_map = detect(base, tokenizer, recipe=Recipe().replace(settings))
    decoder = Decoder.of(base)
    rows = token_rows(tokenizer, read_text(arguments.heldout, "evaluation"), 64,
                      min(arguments.length, decoder.max_length))
    selectors = make_plan(decoder.shape(arguments.model), sink_map, Recipe().replace(
        [*settings, f"protect.sink_weight={UNCAPPED}"])).calibration.sinks
    for token, selector in zip((t for t in sink_map.tokens if t.kind != "learned"), selectors, strict=True):
        print(f"- {token.text!r} at {token.position}: read {selector.weight:.1f} times as often as it stands there")
    print("\n| bits | sink weight | KL, nats | less than weight 1, nats | 95 % interval |")
    print("|---:|---:|---:|---:|---|")
    for bits in arguments.bits:
        plain: list[float] | None = None
        for weight in arguments.weights:
            cap = UNCAPPED if weight == "attention" else float(weight)
            recipe = Recipe().replace([*settings, f"weights.bits={bits}", f"protect.sink_weight={cap}"])
            model = load_model(folder, torch.float32)
            quantize(model, make_plan(decoder.shape(arguments.model), sink_map, recipe), tokenizer)
            found = row_divergences(base, model, rows)
            plain = plain or found
            ones = [1.0] * len(found)
            gain, low, high = paired_difference("kl", (plain, ones), (found, ones), 2000, arguments.seed)
            print(f"| {bits} | {weight} | {sum(found) / len(found):.5f} | {gain:.5f} | {low:.5f} to {high:.5f} |",
                  flush=True)


if __name__ == "__main__":
    main()
