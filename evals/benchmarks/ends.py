"""Bits of the output head and the token embedding beside one recipe: KL divergence and bytes of the checkpoint.

    python evals/benchmarks/ends.py MODEL [--recipe w4a16-sink] [--sink-map map.json] [--pairs 16,16 8,8 4,8 ...]
                                    [--text NAME=FILE ...] [--held-out 12] [--set KEY=VALUE ...] [--lines FILE.jsonl]

A pair is lm_head,embeddings. The blocks are quantized once, with both in 16 bits, and every pair is rounded on top of
them; a run calibrates its blocks on the rounded embedding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import Line, Lines, held_out_texts, sink_map_of, table

from sinkquant import Recipe, quantize
from sinkquant.evaluate import compare_rows
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_plan
from sinkquant.quantize.ends import quantize_ends

PAIRS = ["16,16", "8,16", "4,16", "8,8", "4,8", "3,8"]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="w4a16-sink")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="LM_HEAD,EMBEDDINGS")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--held-out", type=int, default=12, help="held-out rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--lines", type=Path, help="keep what was measured here")
    arguments = parser.parse_args()
    folder, recipe = resolve(arguments.model), Recipe.load(arguments.recipe).replace(arguments.set)
    base, model = (load_model(folder, torch.float32) for _ in range(2))
    tokenizer = load_tokenizer(folder)
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    shape = Decoder.of(open_model(folder)).shape(arguments.model)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    quantize(model, make_plan(shape, sink_map, recipe), tokenizer)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    whole, tie = [end.weight for end in ends], model.config.tie_word_embeddings
    lines = Lines(arguments.lines)
    for pair in arguments.pairs:
        head, embeddings = pair.split(",")
        asked = [f"weights.lm_head={head}", f"weights.embeddings={embeddings}"]
        plan = make_plan(shape, sink_map, recipe.replace(asked))
        for end, weight in zip(ends, whole, strict=True):
            end.weight = torch.nn.Parameter(weight.data.clone(), requires_grad=False)
        if tie:
            ends[1].weight = ends[0].weight
        quantize_ends(Decoder.of(model), plan)
        for text, rows in texts.items():
            labels = {"lm_head": head, "embeddings": embeddings} | ({"text": text} if text else {})
            if not lines.has(labels):
                lines.add(Line.of(labels, compare_rows(base, model, rows), size=plan.weight_bytes))
    print(table(lines.lines, ["text"], recipe.seed))


if __name__ == "__main__":
    main()
