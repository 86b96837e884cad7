"""Divergence over a continuation through several KV caches: a prompt in one pass, what follows token by token.

    python evals/benchmarks/kv_generation.py MODEL --lines FILE.jsonl [--sink-map MAP] [--text FILE] [--rows 6]
                                             [--prompt 512] [--tokens 512] [--bits 2] [--caches NAME ...]

While a model writes, every token is computed from packed keys and values and leaves its own behind, so that errors can
add up (KVarN, arXiv 2606.03458). The text is given, so that all see the same tokens. KL divergence is from the
unquantized model, which reads the rows in one pass, in nats per token by distance from the prompt. Bits are counted at
the end of the continuation. The caches are those of `kv_caches.py`. Lines that are in FILE already are not measured
again.
"""

from __future__ import annotations

from typing import Any

import torch
from kv_caches import BASE, Caches
from measure import RESAMPLES, keep_line, kept_lines, parser_of_lines, sink_map_of

from sinkquant.evaluate import paired_difference
from sinkquant.evaluate.divergence import token_figures
from sinkquant.evaluate.generation import continued_states
from sinkquant.evaluate.positions import binned, bins
from sinkquant.evaluate.states import last_states
from sinkquant.models import load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.models.head import OutputHead
from sinkquant.recipe import Recipe

OURS = "ours"


def table(lines: list[dict[str, Any]], tokens: int) -> str:
    """Markdown; differences are of all tokens, to "ours" of the same bits, paired by rows."""
    places = bins(tokens)
    made = ["| codes | cache | bits per number | "
            + " | ".join(f"{first} to {last - 1}" for first, last in places[2:])
            + " | all | more than ours |", "|---:|---|---:|" + "---:|" * (len(places) - 1) + "---|"]
    ours = {line["bits"]: line for line in lines if line["cache"] == OURS}
    for line in sorted(lines, key=lambda one: (one["bits"], one["cache"])):
        means = torch.tensor(line["kl"]).mean(0).tolist()
        whole = [sum(value * (last - first) for value, (first, last) in zip(row, places, strict=True)) / tokens
                 for row in line["kl"]]
        more = ""
        if line["bits"] in ours and line["cache"] not in (OURS, BASE):
            theirs = [sum(value * (last - first) for value, (first, last) in zip(row, places, strict=True)) / tokens
                      for row in ours[line["bits"]]["kl"]]
            ones = [1.0] * len(whole)
            between = paired_difference("kl", (whole, ones), (theirs, ones), RESAMPLES, 0)
            more = "{:.4f}, {:.4f} to {:.4f}".format(*between)
        made.append(f"| {line['bits']} | {line['cache']} | {line['bits_per_number']:.2f} | "
                    + " | ".join(f"{value:.4f}" for value in means[2:])
                    + f" | {sum(whole) / len(whole):.4f} | {more} |")
    return "\n".join(made)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = parser_of_lines(__doc__, "default: the packaged evaluation text")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--caches", nargs="*", default=[], metavar="NAME")
    arguments = parser.parse_args()
    lines = kept_lines(arguments.lines)
    folder = resolve(arguments.model)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    sink_map = sink_map_of(arguments, model, tokenizer, Recipe().replace(["detect.super_weights=false"]))
    length = arguments.prompt + arguments.tokens
    rows = token_rows(tokenizer, read_text(arguments.text, "evaluation"), arguments.rows, length)
    states = last_states(model, rows)
    for bits in arguments.bits:
        caches = Caches(model, tokenizer, sink_map, bits, arguments.lines.parent)
        for name, (make, per_number) in caches.named(length, arguments.caches).items():
            if (bits, name) in {(line["bits"], line["cache"]) for line in lines}:
                continue
            found = continued_states(model, rows, arguments.prompt, make())
            head = OutputHead(model)
            (figures,) = token_figures([head, head], [states, found], rows)
            lines.append({"bits": bits, "cache": name, "bits_per_number": per_number,
                          "kl": binned(figures.kl[:, arguments.prompt:]).tolist()})
            keep_line(arguments.lines, lines[-1])
    print(table(lines, arguments.tokens))


if __name__ == "__main__":
    main()
