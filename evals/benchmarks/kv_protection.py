"""What exact sinks in the KV cache are worth: divergence and added loss beside the control of equal bytes.

    python evals/benchmarks/kv_protection.py MODEL [--sink-map MAP] [--bits 4 3 2] [--rows 64]
                                             [--length 512] [--window 32] [--set KEY=VALUE ...]

Weights are untouched; every row is read through the packed cache in chunks, as decoding would read it.
"""

from __future__ import annotations

import argparse

import torch
from measure import sink_map_of

from sinkquant.evaluate.divergence import compare_rows
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy.kv_cache import make_kv_control, make_kv_plan
from sinkquant.recipe import Recipe


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", help="of this model, made before")
    parser.add_argument("--text", help="held-out text; default: the packaged one")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer = load_tokenizer(folder)
    base, other = (load_model(folder, torch.float32) for _ in range(2))
    settings = Recipe().replace(["detect.super_weights=false", f"kv_cache.window={arguments.window}",
                                 f"kv_cache.length={arguments.length}", *arguments.set])
    sink_map = sink_map_of(arguments, base, tokenizer, settings)
    rows = token_rows(tokenizer, read_text(arguments.text, "evaluation"), arguments.rows, arguments.length)
    print("| bits | bytes | control | KL | control | difference, 95 % interval | loss added | control | "
          "difference, 95 % interval |\n|---:|---:|---:|---:|---:|---|---:|---:|---|")
    for bits in arguments.bits:
        recipe = settings.replace([f"kv_cache.key_bits={bits}", f"kv_cache.value_bits={bits}"])
        aware = make_kv_plan(Decoder.of(base).shape(arguments.model), sink_map, recipe)
        control = make_kv_control(aware)
        assert aware is not None
        assert control is not None
        kept, plain = (compare_rows(base, other, rows, kv=plan) for plan in (aware, control))
        added = [[loss - before for loss, before in zip(found.other_loss, found.baseline_loss, strict=True)]
                 for found in (kept, plain)]
        cells = [f"{bits}", f"{aware.bytes:,}", f"{control.bytes:,}"]
        for mine, its in ((kept.kl, plain.kl), (added[0], added[1])):
            ones = [1.0] * len(mine)
            gain, low, high = paired_difference("kl", (its, ones), (mine, ones), 2000, 0)
            cells += [f"{sum(mine) / len(mine):.5f}", f"{sum(its) / len(its):.5f}",
                      f"{gain:.5f}, {low:.5f} to {high:.5f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
