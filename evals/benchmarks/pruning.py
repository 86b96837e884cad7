"""Pattern x method x statistics policy: mean KL divergence and perplexity on held-out rows, with paired intervals.

    python evals/benchmarks/pruning.py MODEL [--patterns unstructured 2:4] [--methods magnitude wanda sparsegpt]
                                       [--statistics all boost cap exclude] [--bits 16 4] [--set prune.sparsity=0.6 ...]

Every line is one pruning of the whole model, on the same calibration rows; with fewer than 16 bits what stays is
quantized as well. Lines of one pattern and width have the same zeros to store and the same bytes. "exclude" is measured
without the exact prefix that a recipe has to give it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.detect import detect
from sinkquant.evaluate.divergence import Divergence, compare_rows
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

HEADER = ("| pattern | bits | method | tokens | KL, nats | 95 % interval | less than `all` | perplexity | CPU s |\n"
          "|---|---:|---|---|---:|---|---|---:|---:|")
RESAMPLES = 2000
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
    parser.add_argument("--text", help="held-out text; default: the packaged one")
    arguments = parser.parse_args()
    base = load_model(resolve(arguments.model), torch.float32)
    tokenizer = load_tokenizer(resolve(arguments.model))
    recipe = Recipe().replace(["detect.super_weights=false", *arguments.set])
    held_out = token_rows(tokenizer, read_text(arguments.text, "evaluation"), 64,
                          min(512, Decoder.of(base).max_length))
    sink_map = detect(base, tokenizer, recipe=recipe, name=arguments.model)
    print(HEADER)
    first: dict[str, Divergence] = {}
    for label, plan in plans(arguments, base, sink_map, recipe):
        model = load_model(resolve(arguments.model), torch.float32)
        start = time.process_time()
        quantize(model, plan, tokenizer)
        seconds = time.process_time() - start
        found = compare_rows(base, model, held_out)
        blind = first.setdefault(" ".join(label[:3]), found)
        print(line(label, found, blind, seconds, recipe.seed), flush=True)


def plans(arguments: argparse.Namespace, base: PreTrainedModel, sink_map: SinkMap,
          recipe: Recipe) -> Iterator[tuple[list[str], Plan]]:
    """(pattern, bits, method, policy) and the plan of everything that is to be measured; the first line of a method is
    what its others are compared with."""
    shape = Decoder.of(base).shape(arguments.model)
    for pattern in arguments.patterns:
        for bits in arguments.bits:
            for method in arguments.methods:
                width = ["weights.ignore=['*']"] if bits == 16 else [f"weights.bits={bits}"]
                plan = make_plan(shape, sink_map, recipe.replace(
                    [*width, f"prune.method={method}", f"prune.pattern='{pattern}'"]))
                for policy in arguments.statistics if plan.needs_rows else [BLIND]:
                    known = plan.calibration.model_copy(update={"statistics": policy})
                    yield [pattern, str(bits), method, policy], plan.model_copy(update={"calibration": known})


def line(label: list[str], found: Divergence, first: Divergence, seconds: float, seed: int) -> str:
    """One row of the table."""
    ones, zeros = [1.0] * len(found.kl), [0.0] * len(found.kl)
    mean, low, high = paired_difference("kl", (found.kl, ones), (zeros, ones), RESAMPLES, seed)
    less, least, most = paired_difference("kl", (first.kl, ones), (found.kl, ones), RESAMPLES, seed)
    gain = "" if found is first else f"{less:.4f} ({least:.4f} to {most:.4f})"
    perplexity = float(torch.tensor(found.other_loss, dtype=torch.float64).mean().exp())
    return (f"| {' | '.join(label)} | {mean:.4f} | {low:.4f} to {high:.4f} | {gain} | {perplexity:.2f} | "
            f"{seconds:.0f} |")


if __name__ == "__main__":
    main()
