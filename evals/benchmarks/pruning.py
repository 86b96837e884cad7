"""Pattern x method x statistics policy: mean KL divergence and perplexity on held-out rows, with paired intervals.

    python evals/benchmarks/pruning.py MODEL [--patterns unstructured 2:4] [--methods magnitude wanda sparsegpt]
                                       [--statistics all boost cap exclude] [--bits 16 4] [--set prune.sparsity=0.6 ...]
                                       [--held-out 64] [--lines FILE.jsonl]

Every line is one pruning of the whole model, on the same calibration rows; with fewer than 16 bits what stays is
quantized as well. Lines of one pattern and width have the same zeros to store and the same bytes. "exclude" is measured
without the exact prefix that a recipe has to give it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Lines, held_out_texts, sink_map_of, table
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.models import Decoder, load_model, load_tokenizer, resolve
from sinkquant.policy import make_plan
from sinkquant.recipe import Recipe

BLIND = "all"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--statistics", nargs="+", default=["all", "boost", "attention", "cap", "exclude"])
    parser.add_argument("--bits", type=int, nargs="+", default=[16])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--held-out", type=int, default=64, help="held-out rows")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--lines", type=Path, help="keep what was measured here (measure.py)")
    arguments = parser.parse_args()
    base = load_model(resolve(arguments.model), torch.float32)
    tokenizer = load_tokenizer(resolve(arguments.model))
    recipe = Recipe().replace(["detect.super_weights=false", *arguments.set])
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    lines = Lines(arguments.lines)
    for labels, plan in plans(arguments, base, sink_map, recipe):
        lines.measure(labels, resolve(arguments.model), base, plan, tokenizer, texts)
    print(table(lines.lines, ["pattern", "bits", "method", "text"], recipe.seed))


def plans(arguments: argparse.Namespace, base: PreTrainedModel, sink_map: SinkMap,
          recipe: Recipe) -> Iterator[tuple[dict[str, str], Plan]]:
    """What is to be measured, and its plan; the first line of a method is what its others are compared with."""
    shape = Decoder.of(base).shape(arguments.model)
    for pattern in arguments.patterns:
        for bits in arguments.bits:
            for method in arguments.methods:
                width = ["weights.ignore=['*']"] if bits == 16 else [f"weights.bits={bits}"]
                plan = make_plan(shape, sink_map, recipe.replace(
                    [*width, f"prune.method={method}", f"prune.pattern='{pattern}'"]))
                for policy in arguments.statistics if plan.needs_rows else [BLIND]:
                    known = plan.calibration.model_copy(update={"statistics": policy})
                    labels = {"pattern": pattern, "bits": str(bits), "method": method, "tokens": policy}
                    yield labels, plan.model_copy(update={"calibration": known})


if __name__ == "__main__":
    main()
