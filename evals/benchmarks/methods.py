"""Method x bits x statistics policy: mean KL divergence and perplexity on held-out rows, with paired intervals.

    python evals/benchmarks/methods.py MODEL [--methods rtn gptq gptaq] [--statistics all boost] [--bits 4 3 2]
                                             [--transforms none awq rotate ...] [--set weights.descent=0 ...]
                                             [--checkpoint NAME=DIR ...]
    python evals/benchmarks/methods.py MODEL --rows rows.safetensors

Every line is one quantization of the whole model, on the same calibration rows. A `--checkpoint`, a peer's for
instance (`peers.py` makes them, from the rows that `--rows` writes), is measured beside them on the same held-out rows.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sinkquant.artifacts import Transform
from sinkquant.detect import detect
from sinkquant.evaluate.divergence import Divergence, compare_rows
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.formats import load_dense
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

HEADER = ("| | bits | tokens | KL, nats | 95 % interval | less than the first line of these bits | perplexity | "
          "CPU s |\n|---|---:|---|---:|---|---|---:|---:|")
RESAMPLES = 2000
TRANSFORMS = {"none": [], "values": ["weights.rotate=values"], "rotate": ["weights.rotate=full"],
              "smoothquant": ["weights.smooth=smoothquant"], "awq": ["weights.smooth=awq"],
              "scale": ["protect.channels=scale"], "weighed": []}
"""What is done before quantizing. "weighed" does nothing, but lets rounding to nearest see the calibration rows, as the
transforms that need them do: its scale search weighs columns by their inputs then."""


def main() -> None:
    """Print the table as Markdown, or write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq", "gptaq"])
    parser.add_argument("--statistics", nargs="+", default=["all", "boost"])
    parser.add_argument("--transforms", nargs="+", default=["none"], choices=list(TRANSFORMS))
    parser.add_argument("--held-out", type=int, default=64, help="held-out rows")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--checkpoint", nargs="*", default=[], metavar="NAME:BITS=DIR")
    parser.add_argument("--text", help="held-out text; default: the packaged one")
    parser.add_argument("--rows", help="write calibration and held-out rows here, and stop")
    arguments = parser.parse_args()
    base = load_model(resolve(arguments.model), torch.float32)
    tokenizer = load_tokenizer(resolve(arguments.model))
    recipe = Recipe().replace(["detect.super_weights=false", *arguments.set])
    settings, limit = recipe.calibration, Decoder.of(base).max_length
    held_out = token_rows(tokenizer, read_text(arguments.text, "evaluation"), arguments.held_out,
                          min(512, limit))
    if arguments.rows:
        calibration = token_rows(tokenizer, read_text(settings.text, "calibration"), settings.rows,
                                 min(settings.length, limit), settings.bos)
        save_file({"calibration": calibration, "held_out": held_out}, arguments.rows)
        return
    print(HEADER)
    first: dict[str, Divergence] = {}
    for name, bits, tokens, model, seconds in candidates(arguments, base, recipe):
        found = compare_rows(base, model, held_out)
        print(line(name, bits, tokens, found, first.setdefault(bits, found), seconds, recipe.seed), flush=True)


def candidates(arguments: argparse.Namespace, base: PreTrainedModel,
               recipe: Recipe) -> Iterator[tuple[str, str, str, PreTrainedModel, float | None]]:
    """Name, bits, statistics policy, model and CPU seconds of everything that is to be measured, peers first."""
    for checkpoint in arguments.checkpoint:
        label, _, folder = checkpoint.partition("=")
        name, _, bits = label.rpartition(":")
        yield name, bits, "all", load_dense(Path(folder), torch.float32), None
    tokenizer = load_tokenizer(resolve(arguments.model))
    sink_map = detect(base, tokenizer, recipe=recipe, name=arguments.model)
    shape = Decoder.of(base).shape(arguments.model)
    for bits in arguments.bits:
        for method, transform in itertools.product(arguments.methods, arguments.transforms):
            # Rounding to nearest alone, and a rotation, take no statistics.
            plain = method == "rtn" and transform in ("none", "values", "rotate")
            for statistics in ["none"] if plain else arguments.statistics:
                assigned = [f"weights.bits={bits}", f"weights.method={method}", *TRANSFORMS[transform]]
                assigned += [f"protect.statistics={statistics}"] if statistics != "none" else []
                model = load_model(resolve(arguments.model), torch.float32)
                start = time.process_time()
                plan = make_plan(shape, sink_map, recipe.replace(assigned))
                if transform == "weighed":
                    plan = plan.model_copy(update={"transforms": [Transform(name="scale")]})
                quantize(model, plan, tokenizer)
                name = method if transform == "none" else f"{method}, {transform}"
                yield name, str(bits), statistics, model, time.process_time() - start


def line(name: str, bits: str, tokens: str, found: Divergence, first: Divergence, seconds: float | None,
         seed: int) -> str:
    """One row of the table."""
    ones, zeros = [1.0] * len(found.kl), [0.0] * len(found.kl)
    mean, low, high = paired_difference("kl", (found.kl, ones), (zeros, ones), RESAMPLES, seed)
    less, least, most = paired_difference("kl", (first.kl, ones), (found.kl, ones), RESAMPLES, seed)
    gain = "" if found is first else f"{less:.5f} ({least:.5f} to {most:.5f})"
    perplexity = float(torch.tensor(found.other_loss, dtype=torch.float64).mean().exp())
    return (f"| {name} | {bits} | {tokens} | {mean:.5f} | {low:.5f} to {high:.5f} | {gain} | {perplexity:.3f} | "
            f"{'' if seconds is None else f'{seconds:.0f}'} |")


if __name__ == "__main__":
    main()
