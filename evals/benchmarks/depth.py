"""What a model loses without blocks, without heads, and with fewer bits, at which bytes: mean KL divergence from the
whole model and perplexity on held-out rows.

    python evals/benchmarks/depth.py MODEL --sink-map FILE --choice FILE.json [--lines FILE.jsonl] [--rows 12]
                                     [--length 128] [--blocks 1 2 3 4 6] [--shares 0.05 0.1 0.2 0.3] [--bits 8 4 3]
                                     [--mixed 1 2 4] [--seeds 0 1] [--text FILE] [--heldout FILE]
                                     [--tasks NAME ... --task-folder FOLDER --limit 100] [--checkpoints NAME=FOLDER ...]
                                     [--mixed-heads 4:0.18] [--orders NAME ...]

Blocks: "measured" drops those whose absence costs least, one after the other (`prune.blocks`, chosen on calibration
text and kept in --choice), "influence" those that turn the residual stream least, "last" the deepest but the last one,
"random" drawn by a seed. None of them drops the blocks in which massive activations emerge or end, but "last, massive
too" and "emerges" and "ends", which drop nothing else. Heads are silenced: "mixing" those that rest on the sinks at
most tokens, "sink score" those that give them most attention, "norm" those with the smallest output weights, "random"
drawn by a seed, "reading" drawn among those that read information. Bytes of heads are those of their queries and
output columns, which no checkpoint saves unless all layers lose as many. Bits are groups of 64 rounded to nearest with
searched scales; "mixed" is so many bits after the blocks that "measured" drops, "BITS:BLOCKS" or blocks alone for 4
bits, and --mixed-heads BITS:SHARE so many bits with that share of heads silenced besides.
Checkpoints are what `quantize-model run` made. Tasks are lm-eval's, zero-shot, the first documents of each.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Baseline, Line, Lines, held_out_texts, table
from task_scores import Scores, add_options, task_scores
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.artifacts import Plan, SinkMap
from sinkquant.artifacts.blocks import BlockPlan
from sinkquant.artifacts.heads import HeadRole
from sinkquant.blocks import choose_blocks, drop_blocks
from sinkquant.detect.roles import TOKENS, RoleTable, roles_of
from sinkquant.models import Decoder, Walk, head_columns, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.models.hooks import hooked
from sinkquant.models.shorter import shorter_model
from sinkquant.policy import make_plan
from sinkquant.policy.blocks import massive_blocks
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe
from sinkquant.sinks import SinkSelector

ROUNDED = ["weights.method=rtn", "weights.group_size=64", "protect.tokens=false"]


@dataclass
class Bench:
    """The whole model, a copy of it that is taken apart and put together again, and what was measured."""

    folder: Path
    base: Baseline
    model: PreTrainedModel
    rows: torch.Tensor
    lines: Lines
    whole: int
    tasks: Scores | None = None

    def measure(self, labels: dict[str, str], size: int, change: Callable[[], contextlib.AbstractContextManager[None]],
                model: PreTrainedModel | None = None) -> None:
        """Keep a line of the model while a change lasts, unless there is one."""
        if self.lines.has(labels):
            return
        with change():
            found = self.base.compare(model or self.model, self.rows)
            scores = self.tasks(model or self.model, None) if self.tasks else None
        line = Line.of(labels, found, size=size, scores=scores)
        self.lines.add(line)
        print(labels, size, sum(line.kl) / len(line.kl), flush=True)


@contextlib.contextmanager
def without_blocks(model: PreTrainedModel, gone: Sequence[int]) -> Iterator[None]:
    """Some blocks hand on what they are given."""
    # Hooks, and no forward of our own: reading states puts a block's forward back after every batch.
    with hooked(Decoder.of(model).blocks[index].register_forward_hook(_handed_on, with_kwargs=True) for index in gone):
        yield


def _handed_on(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any], given: Any) -> Any:
    hidden = args[0] if args else named["hidden_states"]
    return (hidden, *given[1:]) if isinstance(given, tuple) else hidden


@contextlib.contextmanager
def without_heads(model: PreTrainedModel, gone: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Nothing reads some heads, (layer, head)."""
    decoder, before = Decoder.of(model), []
    for layer, head in gone:
        name, parts = head_columns(decoder, layer)
        columns = decoder.weight(name)[:, parts[head]]
        before.append((columns, columns.clone()))
        columns.zero_()
    try:
        yield
    finally:
        for columns, values in before:
            columns.copy_(values)


def block_orders(choice: BlockPlan, held: set[int], count: int, seeds: Sequence[int]) -> dict[str, list[int]]:
    """Name -> blocks in the order in which they go."""
    free = [block for block in range(count) if block not in held]
    influence = {cost.block: cost.influence for cost in choice.costs}
    found = {"measured": [one.block for one in choice.dropped], "influence": sorted(free, key=lambda b: influence[b]),
             "last": [block for block in reversed(free) if block < count - 1],
             "last, massive too": list(reversed(range(count - 1)))}
    for seed in seeds:
        found[f"random {seed}"] = random.Random(seed).sample(free, len(free))
    return found


def head_orders(bench: Bench, sink_map: SinkMap, roles: list[list[HeadRole]],
                seeds: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """Name -> (layer, head) in the order in which they go."""
    decoder = Decoder.of(bench.model)
    places = [(layer, head) for layer, row in enumerate(roles) for head in range(len(row))]
    norms: dict[tuple[int, int], float] = {}
    for layer in range(len(roles)):
        name, parts = head_columns(decoder, layer)
        norms |= {(layer, head): float(decoder.weight(name)[:, part].norm()) for head, part in enumerate(parts)}
    found = {"mixing": sorted(places, key=lambda p: -roles[p[0]][p[1]].rests),
             "sink score": sorted(places, key=lambda p: -sink_map.heads[p[0]][p[1]].sink_score),
             "norm": sorted(places, key=lambda p: norms[p])}
    reading = [place for place in places if roles[place[0]][place[1]].role in ("information", "positional")]
    for seed in seeds:
        found[f"random {seed}"] = random.Random(seed).sample(places, len(places))
        found[f"reading {seed}"] = random.Random(seed).sample(reading, len(reading))
    return found


def read_roles(bench: Bench, sink_map: SinkMap, calibration: torch.Tensor) -> list[list[HeadRole]]:
    """As detection tells them, on calibration rows."""
    if sink_map.head_roles:
        return sink_map.head_roles
    rows = calibration[:TOKENS // calibration.shape[1]]
    observer = RoleTable(rows, SinkSelector.of(sink_map.tokens).mask(rows))
    for step in Walk(Decoder.of(bench.model), rows, 8, observers=[observer]).steps():
        observer.step = step
        step.run()
        observer.close_layer()
    return roles_of(observer, 0, str)


def rounded(bench: Bench, plan: Plan, kept: list[int] | None) -> PreTrainedModel:
    """The model, or a shorter one, rounded as a plan says."""
    model = load_model(bench.folder)
    if kept is not None:
        drop_blocks(model, kept)
    return quantize(model, plan).float()


def block_bytes(model: PreTrainedModel) -> list[int]:
    """Bytes of every block's tensors."""
    decoder = Decoder.of(model)
    item = model.dtype.itemsize
    return [sum(parameter.numel() for parameter in block.parameters()) * item for block in decoder.blocks]


def main() -> None:
    """Measure what is not measured yet, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", type=Path, required=True)
    parser.add_argument("--choice", type=Path, required=True, help="the measured choice of blocks, made if not there")
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--choice-rows", type=int, default=16, help="rows that the choice is measured on, 16 at most")
    parser.add_argument("--text", help="of calibration; default: the packaged one")
    parser.add_argument("--heldout", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 2, 3, 4, 6])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3])
    parser.add_argument("--mixed", type=_mixture, nargs="*", default=[(4, 1), (4, 2), (4, 4)], metavar="[BITS:]BLOCKS")
    parser.add_argument("--mixed-heads", type=_shares, nargs="*", default=[], metavar="BITS:SHARE")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--orders", nargs="*", help="these orders of blocks and heads alone")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="NAME=FOLDER", help="of finished runs")
    add_options(parser)
    arguments = parser.parse_args()
    folder, sink_map = resolve(arguments.model), SinkMap.load(arguments.sink_map)
    tokenizer, stored = load_tokenizer(folder), load_model(folder)
    count = max([*arguments.blocks, *(blocks for _, blocks in arguments.mixed)], default=0)
    if not arguments.choice.is_file():
        chosen = choose_blocks(stored, tokenizer, sink_map, Recipe().changed(
            prune={"blocks": count}, calibration={"text": arguments.text}, detect={"rows": arguments.choice_rows}))
        arguments.choice.write_text(chosen.model_dump_json(indent=1) + "\n", encoding="utf-8")
    choice = BlockPlan.model_validate_json(arguments.choice.read_text(encoding="utf-8"))
    ((_, rows),) = held_out_texts(arguments.heldout, tokenizer, arguments.rows, arguments.length).items()
    base, model = load_model(folder, torch.float32), load_model(folder, torch.float32)
    tasks = task_scores(arguments, tokenizer)
    bench = Bench(folder, Baseline(base), model, rows, Lines(arguments.lines), choice.whole_bytes, tasks)
    if tasks:
        bench.measure({"what": "whole", "by": "", "count": ""}, bench.whole, contextlib.nullcontext)
    sizes, every = block_bytes(stored), range(len(choice.costs))
    held = {block for block in massive_blocks(sink_map) if block is not None}
    orders = block_orders(choice, held, len(sizes), arguments.seeds)
    asked = arguments.orders
    for name, order in orders.items():
        for number in arguments.blocks if asked is None or name in asked else []:
            gone = order[:number]
            bench.measure({"what": "blocks", "by": name, "count": str(number)},
                          bench.whole - sum(sizes[block] for block in gone), partial(without_blocks, model, gone))
    for name, block in zip(("emerges", "ends"), massive_blocks(sink_map), strict=True):
        if block is not None and (asked is None or name in asked):
            bench.measure({"what": "blocks", "by": name, "count": "1"}, bench.whole - sizes[block],
                          partial(without_blocks, model, [block]))
    for bits, number in [*((bits, 0) for bits in arguments.bits), *arguments.mixed]:
        labels = {"what": "weights" if not number else "blocks and weights", "by": f"{bits} bits",
                  "count": str(number or "")}
        if not bench.lines.has(labels):
            dropped = {one.block for one in choice.dropped[:number]}
            kept = [block for block in every if block not in dropped]
            shape = Decoder.of(shorter_model(stored, kept) if number else stored).shape("model")
            less = sink_map if not number else sink_map.model_copy(update={
                "modules": {}, "model": sink_map.model.model_copy(update={
                    "layers": len(kept), "parameters": shape.parameters})})
            plan = make_plan(shape, less, Recipe().replace([*ROUNDED, f"weights.bits={bits}"]))
            made = rounded(bench, plan, kept if number else None)
            bench.measure(labels, plan.weight_bytes, contextlib.nullcontext, made)
    for name, _, run in (one.partition("=") for one in arguments.checkpoints):
        bench.measure({"what": "checkpoint", "by": name, "count": ""}, Plan.load(Path(run) / "plan.json").weight_bytes,
                      contextlib.nullcontext, sq.load(Path(run) / "model", torch.float32)[0])
    content = read_text(arguments.text, "calibration", tokenizer)
    roles = read_roles(bench, sink_map, token_rows(tokenizer, content, 32, 64))
    ranked = {name: places for name, places in head_orders(bench, sink_map, roles, arguments.seeds).items()
              if asked is None or name in asked}
    heads = sum(map(len, roles))
    for name, places in ranked.items():
        for share in arguments.shares:
            gone_heads = places[:round(share * heads)]
            saved = sum(_head_weights(stored, layer) for layer, _ in gone_heads) * stored.dtype.itemsize
            bench.measure({"what": "heads", "by": name, "count": f"{share:.0%}"}, bench.whole - saved,
                          partial(without_heads, model, gone_heads))
    for bits, share in arguments.mixed_heads:
        plan = make_plan(Decoder.of(stored).shape("model"), sink_map, Recipe().replace(
            [*ROUNDED, f"weights.bits={bits}"]))
        made = rounded(bench, plan, None)
        for name, places in ranked.items():
            gone_heads = places[:round(share * heads)]
            saved = round(sum(_head_weights(stored, layer) for layer, _ in gone_heads) * (bits + 16 / 64) / 8)
            bench.measure({"what": "heads and weights", "by": f"{bits} bits, {name}", "count": f"{share:.0%}"},
                          plan.weight_bytes - saved, partial(without_heads, made, gone_heads), made)
    print(table(bench.lines.lines, ["what", "count"]))


def _shares(text: str) -> tuple[int, float]:
    bits, _, share = text.partition(":")
    return int(bits), float(share)


def _mixture(text: str) -> tuple[int, int]:
    bits, _, blocks = text.rpartition(":")
    return int(bits or 4), int(blocks)


def _head_weights(model: PreTrainedModel, layer: int) -> int:
    """Weights of a head's queries and output columns."""
    decoder = Decoder.of(model)
    name, parts = head_columns(decoder, layer)
    return 2 * (parts[0].stop - parts[0].start) * decoder.weight(name).shape[0]


if __name__ == "__main__":
    main()
