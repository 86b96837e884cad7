"""Method x bits x statistics policy: mean KL divergence and perplexity on held-out rows, with paired intervals.

    python evals/benchmarks/methods.py MODEL [--methods rtn gptq gptaq] [--statistics all boost exclude+prefix]
                                             [--bits 4 3 2] [--transforms none awq rotate ...]
                                             [--set weights.descent=0 ...] [--checkpoint NAME:BITS=DIR ...]
                                             [--lines FILE.jsonl] [--text NAME=FILE ...]
    python evals/benchmarks/methods.py MODEL --rows rows.safetensors

Every line is one quantization of the whole model, on the same calibration rows. A `--checkpoint`, a peer's for
instance (`peers.py` makes them, from the rows that `--rows` writes), is measured beside them on the same held-out rows.
With "+prefix" keys and values of `<bos>` are those of the unquantized model, while the model is quantized and while it
is measured. `--lines` keeps what was measured (`measure.py`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Line, Lines, held_out_texts, sink_map_of, table
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, Transform
from sinkquant.evaluate import compare_rows
from sinkquant.formats import load_dense
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.recipe import Recipe

PREFIX = "kv_cache={key_bits: 16, value_bits: 16, group_size: 128, window: 512, prefix: bos}"
TRANSFORMS = {"none": [], "values": ["weights.rotate=values"], "rotate": ["weights.rotate=full"],
              "smoothquant": ["weights.smooth=smoothquant"], "awq": ["weights.smooth=awq"],
              "scale": ["protect.channels=scale"], "weighed": [], "tune": ["weights.tune=30"],
              "distill": ["weights.distill=60"], "distill codes": ["weights.distill=60", "weights.distill_codes=true"]}
"""What is done before quantizing. "weighed" does nothing, but lets rounding to nearest see the calibration rows, as the
transforms that need them do: its scale search weighs columns by their inputs then. "tune" and "distill" are done
afterwards."""


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
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--rows", help="write calibration and held-out rows here, and stop")
    parser.add_argument("--lines", type=Path, help="keep what was measured here")
    arguments = parser.parse_args()
    base = load_model(resolve(arguments.model), torch.float32)
    tokenizer = load_tokenizer(resolve(arguments.model))
    recipe = Recipe().replace(["detect.super_weights=false", *arguments.set])
    settings, limit = recipe.calibration, Decoder.of(base).max_length
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, limit))
    if arguments.rows:
        calibration = token_rows(tokenizer, read_text(settings.text, "calibration"), settings.rows,
                                 min(settings.length, limit), settings.bos)
        save_file({"calibration": calibration, **{name or "held_out": rows for name, rows in texts.items()}},
                  arguments.rows)
        return
    lines = Lines(arguments.lines)
    for checkpoint in arguments.checkpoint:
        label, _, folder = checkpoint.partition("=")
        name, _, bits = label.rpartition(":")
        for text, rows in texts.items():
            labels = {"method": name, "bits": bits, "tokens": "all"} | ({"text": text} if text else {})
            if not lines.has(labels):
                lines.add(Line.of(labels, compare_rows(base, load_dense(Path(folder), torch.float32), rows)))
    for labels, plan in plans(arguments, base, tokenizer, recipe):
        lines.measure(labels, resolve(arguments.model), base, plan, tokenizer, texts)
    print(table(lines.lines, ["bits", "text"], recipe.seed))


def plans(arguments: argparse.Namespace, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
          recipe: Recipe) -> Iterator[tuple[dict[str, str], Plan]]:
    """What is to be measured, and how it is made."""
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    shape = Decoder.of(base).shape(arguments.model)
    for bits, method, transform in itertools.product(arguments.bits, arguments.methods, arguments.transforms):
        # Rounding to nearest alone, and a rotation, take no statistics.
        plain = method == "rtn" and transform in ("none", "values", "rotate")
        for tokens in ["none"] if plain else arguments.statistics:
            policy, _, prefix = tokens.partition("+")
            assigned = [f"weights.bits={bits}", f"weights.method={method}", *TRANSFORMS[transform]]
            assigned += [f"protect.statistics={policy}"] if policy != "none" else []
            assigned += [PREFIX] if prefix else []
            plan = make_plan(shape, sink_map, recipe.replace(assigned))
            if transform == "weighed":
                plan = plan.model_copy(update={"transforms": [Transform(name="scale")]})
            name = method if transform == "none" else f"{method}, {transform}"
            yield {"method": name, "bits": str(bits), "tokens": tokens}, plan


if __name__ == "__main__":
    main()
