"""What packing adds to the time of a whole model's pass over a prompt, and to that of a token after it.

    python evals/benchmarks/kv_prefill.py MODEL --lines FILE.jsonl [--sink-map MAP] [--text FILE] [--lengths 1024 4096]
                                          [--rounds 3] [--tokens 8] [--bits 2] [--threads 1] [--caches NAME ...]

One row of text is read in one pass, and `--tokens` more one by one, through a cache of each kind in turn, with the
unquantized weights in bfloat16. Figures are processor time, the least of the rounds, and ratios to the cache in
bfloat16 of the same run. The caches are those of `kv_caches.py`. Lengths that are in FILE already are not measured
again.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from kv_caches import BASE, Caches
from measure import keep_line, kept_lines, parser_of_lines, sink_map_of
from transformers import Cache, DynamicCache, PreTrainedModel

from sinkquant.models import load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.recipe import Recipe


@torch.no_grad()
def timed(model: PreTrainedModel, cache: Cache, row: torch.Tensor, prompt: int) -> tuple[float, float]:
    """Seconds of processor time: the pass over the first `prompt` tokens, and the mean of those after it."""
    start = time.process_time()
    model(row[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    read = time.process_time()
    for token in row[:, prompt:].split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
    return read - start, (time.process_time() - read) / max(1, row.shape[1] - prompt)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one line per length and cache."""
    made = ["| tokens | cache | prompt, s | x bfloat16 | token, ms | x bfloat16 |", "|---:|---|---:|---:|---:|---:|"]
    base = {line["length"]: line for line in lines if line["cache"] == BASE}
    for line in sorted(lines, key=lambda one: one["length"]):
        first = base[line["length"]]
        made.append(f"| {line['length']:,} | {line['cache']} | {line['prompt']:.2f} | "
                    f"{line['prompt'] / first['prompt']:.3f} | {1e3 * line['token']:.1f} | "
                    f"{line['token'] / first['token']:.2f} |")
    return "\n".join(made)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = parser_of_lines(__doc__, "default: the packaged evaluation text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--caches", nargs="*", default=["ours", "KIVI"], metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = kept_lines(arguments.lines)
    folder = resolve(arguments.model)
    model, tokenizer = load_model(folder, torch.bfloat16), load_tokenizer(folder)
    sink_map = sink_map_of(arguments, model, tokenizer, Recipe().replace(["detect.super_weights=false"]))
    caches = Caches(model, tokenizer, sink_map, arguments.bits, arguments.lines.parent)
    for length in arguments.lengths:
        if length in {line["length"] for line in lines}:
            continue
        (row,) = token_rows(tokenizer, read_text(arguments.text, "evaluation"), 1, length + arguments.tokens).split(1)
        makers = {BASE: lambda: DynamicCache(config=model.config)} | {
            name: make for name, (make, _) in caches.named(length, arguments.caches).items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for _ in range(arguments.rounds):
            for name, make in makers.items():
                found[name].append(timed(model, make(), row, length))
        for name, seconds in found.items():
            lines.append({"length": length, "cache": name, "prompt": min(read for read, _ in seconds),
                          "token": min(token for _, token in seconds)})
            keep_line(arguments.lines, lines[-1])
    print(table(lines))


if __name__ == "__main__":
    main()
