"""What an FP8 KV cache with stored scales loses: sinks in the ranges or out of them, one scale per layer or per head.

    python evals/benchmarks/kv_scales.py MODEL [--sink-map map.json] [--text NAME=FILE ...] [--held-out 12]
                                         [--set KEY=VALUE ...] [--lines FILE.jsonl]

Keys and values of the unquantized model are rounded as compressed-tensors does in transformers; weights are not. "one"
is a scale of 1, which vLLM takes without scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import Line, Lines, held_out_texts, sink_map_of, table

from sinkquant import Recipe
from sinkquant.evaluate import compare_rows
from sinkquant.models import Decoder, load_model, load_tokenizer, resolve
from sinkquant.policy import make_plan
from sinkquant.quantize.kv_scheme import kv_scales, round_cache


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--held-out", type=int, default=12, help="held-out rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--lines", type=Path, help="keep what was measured here")
    arguments = parser.parse_args()
    folder, lines = resolve(arguments.model), Lines(arguments.lines)
    recipe = Recipe().replace(["weights.method=rtn", *arguments.set])
    base, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    decoder = Decoder.of(base)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, decoder.max_length))
    for strategy in ("tensor", "attn_head"):
        for sinks in ("all", "exclude", "one"):
            asked = f"kv_cache_scheme={{strategy: {strategy}, sinks: {'all' if sinks == 'one' else sinks}}}"
            plan = make_plan(decoder.shape(arguments.model), sink_map, recipe.replace([asked]))
            scales = kv_scales(decoder, plan, tokenizer, "cpu", torch.float32)
            if sinks == "one":
                scales = {name: torch.ones_like(scale) for name, scale in scales.items()}
            rounded = load_model(folder, torch.float32)
            assert plan.kv_scheme is not None
            round_cache(rounded, plan.kv_scheme, scales)
            for text, rows in texts.items():
                labels = {"scale": strategy, "sinks": sinks} | ({"text": text} if text else {})
                if not lines.has(labels):
                    lines.add(Line.of(labels, compare_rows(base, rounded, rows)))
    print(table(lines.lines, ["text"], recipe.seed))


if __name__ == "__main__":
    main()
