"""What rounded activations cost, and what it is worth to keep the sinks out of their ranges: mean KL divergence from
the unquantized model and change of the loss on held-out rows, with paired bootstrap intervals.

    python evals/benchmarks/activations.py MODEL [--text FILE] [--heldout FILE] [--rows 32] [--set KEY=VALUE ...]
                                           [--weights 16 8 4] [--inputs int8 int6 int4]
                                           [--scales all dynamic exclude token]

Weights: 16 as they are (with the scales that calibration finds for 8), 8 with one scale per channel, fewer in groups of
64. Scales: "all" one stored scale per linear that reaches every token (the control), "dynamic" a scale per token where
the sinks would set the range, "exclude" a stored scale that leaves `<bos>` out, whose keys and values come from the
unquantized model, "token" a scale per token everywhere. int6 and int4 are simulated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.cache import make_prefix, prepare
from sinkquant.detect import detect
from sinkquant.evaluate import Divergence, compare_rows, paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

SCALES = {"all": ["activations.scale=tensor", "activations.sinks=all"],
          "dynamic": ["activations.scale=tensor", "activations.sinks=dynamic"],
          "exclude": ["activations.scale=tensor", "activations.sinks=exclude",
                      "kv_cache={key_bits: 16, value_bits: 16, group_size: 128, window: 512, prefix: bos}"],
          "token": ["activations.scale=token"]}


def measured(folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap,
             rows: torch.Tensor, recipe: Recipe, keep_weights: bool) -> Divergence:
    """Quantize the model as the recipe says, or only its inputs, and compare it with the unquantized one."""
    model = load_model(folder, torch.float32)
    plan = make_plan(Decoder.of(model).shape("benchmark"), sink_map, recipe)
    quantize(model, plan, tokenizer)
    if keep_weights:
        model.load_state_dict(base.state_dict())
    if plan.kv_cache is not None:
        prepare(model, make_prefix(base, plan.kv_cache.prefix))
    return compare_rows(base, model, rows, kv=plan.kv_cache)


def main() -> None:
    """Print the table as Markdown, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--heldout")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--weights", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--inputs", nargs="+", default=["int8", "int6", "int4"])
    parser.add_argument("--scales", nargs="+", default=list(SCALES), choices=list(SCALES))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    recipe = Recipe().replace([f"calibration.text={arguments.text or 'null'}", "detect.super_weights=false",
                               *arguments.settings])
    sink_map = detect(base, tokenizer, recipe=recipe)
    rows = token_rows(tokenizer, read_text(arguments.heldout, "evaluation"), arguments.rows,
                      min(arguments.length, Decoder.of(base).max_length), recipe.calibration.bos)
    print("| weights | inputs | scales | KL, nats | less than all, nats | 95 % interval | loss, nats more | "
          "95 % interval |")
    print("|---:|---|---|---:|---:|---|---:|---|", flush=True)
    ones = [1.0] * len(rows)
    for bits in arguments.weights:
        weights = ["weights.bits=8", "weights.group_size=-1"] if bits >= 8 else [
            f"weights.bits={bits}", "weights.group_size=64"]
        method = ["weights.method=rtn", "weights.scale_search=false"] if bits == 16 else []
        for inputs in arguments.inputs:
            plain: list[float] | None = None
            for scale in arguments.scales:
                asked = recipe.replace([*weights, *method, f"activations.format={inputs}", *SCALES[scale]])
                found = measured(folder, base, tokenizer, sink_map, rows, asked, bits == 16)
                plain = plain or found.kl
                gain = paired_difference("kl", (plain, ones), (found.kl, ones), 2000, arguments.seed)
                loss = paired_difference("kl", (found.other_loss, ones), (found.baseline_loss, ones), 2000,
                                         arguments.seed)
                print(f"| {bits} | {inputs} | {scale} | {sum(found.kl) / len(found.kl):.5f} | {gain[0]:.5f} | "
                      f"{gain[1]:.5f} to {gain[2]:.5f} | {loss[0]:+.5f} | {loss[1]:+.5f} to {loss[2]:+.5f} |",
                      flush=True)


if __name__ == "__main__":
    main()
