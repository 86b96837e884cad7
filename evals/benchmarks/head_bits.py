"""Bits by head: is a head's role worth knowing when some heads get more bits than the rest? Mean KL divergence from the
unquantized model on held-out rows, against the same bytes given to heads that are drawn.

    python evals/benchmarks/head_bits.py MODEL --sink-map FILE [--lines FILE.jsonl] [--rows 8] [--length 256]
                                         [--shares 0.2 0.4] [--cache 2:4] [--weights 3:8] [--seeds 0 1 2]
                                         [--heldout FILE] [--group-size 64] [--loss-rows 2] [--calibration FILE]

"LOW:HIGH": all KV heads have LOW bits, and a share of them HIGH. The cache: keys and values of a KV head. Weights: the
rows of the key, value and query projections of a KV head and the columns of the output projection that its queries
write, rounded to nearest with searched scales; everything else stays as it is. No checkpoint holds two numbers of bits
in one module, so that this is what such a format would be worth. A KV head is ranked by the mean over its query heads:
"reading" raises those that rest on the sinks at the fewest tokens (`head_roles` of the sink map), "resting" those that
rest at most, "loss" (cache alone) those whose LOW bits lose most one at a time on calibration rows, "random" drawn by a
seed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import Baseline, Line, Lines, held_out_texts, table
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan, SinkMap
from sinkquant.models import Decoder, head_columns, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.policy.kv_cache import accept_kv, make_kv_plan, with_usual_bits
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

Place = tuple[int, int]
"""(layer, KV head)."""


def orders(sink_map: SinkMap, kv_heads: int, seeds: Sequence[int]) -> dict[str, list[Place]]:
    """Name -> KV heads in the order in which they are raised."""
    rests: dict[Place, float] = {}
    for layer, roles in enumerate(sink_map.head_roles):
        group = len(roles) // kv_heads
        for head in range(kv_heads):
            mine = roles[head * group:(head + 1) * group]
            rests[layer, head] = sum(role.rests for role in mine) / group
    found = {"reading": sorted(rests, key=lambda place: rests[place]),
             "resting": sorted(rests, key=lambda place: -rests[place])}
    return found | {f"random {seed}": random.Random(seed).sample(sorted(rests), len(rests)) for seed in seeds}


def by_loss(base: Baseline, other: PreTrainedModel, plan: KVCachePlan, rows: torch.Tensor, low: int) -> list[Place]:
    """KV heads, first the one that loses most with `low` bits while the others are in 16."""
    whole = with_bits(plan, 16, 16, [])
    lost: dict[Place, float] = {}
    for layer, one in enumerate(plan.layers):
        for head in range(len(one.key_bits)):
            found = base.compare(other, rows, with_bits(whole, 16, low, [(layer, head)]))
            lost[layer, head] = sum(found.kl)
    return sorted(lost, key=lambda place: -lost[place])


def with_bits(plan: KVCachePlan, low: int, high: int, raised: Sequence[Place]) -> KVCachePlan:
    """A cache with other bits; its sizes are those of before."""
    layers = []
    for layer, one in enumerate(plan.layers):
        bits = [high if (layer, head) in raised else low for head in range(len(one.key_bits))]
        layers.append(one.model_copy(update={"key_bits": bits, "value_bits": bits}))
    return with_usual_bits(plan.model_copy(update={"layers": layers}))


def raise_heads(model: PreTrainedModel, better: dict[str, torch.Tensor], raised: Sequence[Place],
                kv_heads: int) -> None:
    """Write the rows and columns of some KV heads in place, from the weights that were rounded to more bits."""
    decoder = Decoder.of(model)
    for layer, head in raised:
        out, parts = head_columns(decoder, layer)
        group, width = len(parts) // kv_heads, parts[0].stop - parts[0].start
        queries = slice(head * group * width, (head + 1) * group * width)
        decoder.weight(out)[:, queries] = better[out][:, queries]
        for leaf, rows in (("q_proj", queries), ("k_proj", slice(head * width, (head + 1) * width)),
                           ("v_proj", slice(head * width, (head + 1) * width))):
            name = out.replace("o_proj", leaf)
            decoder.weight(name)[rows] = better[name][rows]


def rounded(folder: Path, sink_map: SinkMap, bits: int, group_size: int) -> PreTrainedModel:
    """The model with the linears of attention rounded."""
    model = load_model(folder, torch.float32)
    plan = make_plan(Decoder.of(model).shape("model"), sink_map, Recipe().replace(
        ["weights.method=rtn", f"weights.group_size={group_size}", "protect.tokens=false", "weights.ignore=['*mlp*']",
         f"weights.bits={bits}"]))
    return quantize(model, plan).float()


def main() -> None:
    """Measure what is not measured yet, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", type=Path, required=True)
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--heldout", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.2, 0.4])
    parser.add_argument("--cache", default="2:4")
    parser.add_argument("--weights", default="3:8")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--calibration", help="text that \"loss\" is ranked on; default: the packaged one")
    parser.add_argument("--group-size", type=int, default=64, help="of weights")
    parser.add_argument("--loss-rows", type=int, default=2, help="calibration rows that \"loss\" is ranked on; 0: not")
    arguments = parser.parse_args()
    folder, sink_map = resolve(arguments.model), SinkMap.load(arguments.sink_map)
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    ((_, rows),) = held_out_texts(arguments.heldout, tokenizer, arguments.rows, arguments.length).items()
    base, lines = Baseline(load_model(folder, torch.float32)), Lines(arguments.lines)
    shape = Decoder.of(model).shape("model")
    kv_heads = shape.kv_layers[0].heads
    ranked = orders(sink_map, kv_heads, arguments.seeds)
    total = kv_heads * len(shape.kv_layers)

    low, high = map(int, arguments.cache.split(":"))
    plan = make_kv_plan(shape, sink_map, Recipe().replace(
        [f"kv_cache.key_bits={low}", f"kv_cache.value_bits={low}", "kv_cache.window=32", "kv_cache.group_size=32",
         f"kv_cache.length={arguments.length}"]))
    assert plan is not None
    cached = dict(ranked)
    if arguments.loss_rows:
        text = read_text(arguments.calibration, "calibration", tokenizer)
        cached["loss"] = by_loss(base, model, plan, token_rows(tokenizer, text, arguments.loss_rows, arguments.length),
                                 low)
    for name, raised, share in chosen(cached, total, arguments.shares):
        labels = {"what": "cache", "bits": arguments.cache, "share": share, "by": name}
        if not lines.has(labels):
            sized = accept_kv(with_bits(plan, low, high, raised), shape)
            assert sized is not None
            lines.add(Line.of(labels, base.compare(model, rows, sized), size=sized.bytes))

    low, high = map(int, arguments.weights.split(":"))
    worse = rounded(folder, sink_map, low, arguments.group_size)
    before = {name: tensor.clone() for name, tensor in worse.state_dict().items()}
    decoder = Decoder.of(rounded(folder, sink_map, high, arguments.group_size))
    better = {name: decoder.weight(name) for name in decoder.linears}
    for name, raised, share in chosen(ranked, total, arguments.shares):
        labels = {"what": "weights", "bits": arguments.weights, "share": share, "by": name}
        if not lines.has(labels):
            worse.load_state_dict(before)
            with torch.no_grad():
                raise_heads(worse, better, raised, kv_heads)
            lines.add(Line.of(labels, base.compare(worse, rows)))
    print(table(lines.lines, ["what", "share"]))


def chosen(ranked: dict[str, list[Place]], total: int, shares: Sequence[float]) -> list[tuple[str, list[Place], str]]:
    """(order, the heads that are raised, their share in words), first with none and with all raised."""
    first = next(iter(ranked.values()))
    found = [("none", first[:0], "0%"), ("all", first, "100%")]
    return found + [(name, order[:round(share * total)], f"{share:.0%}") for share in shares
                    for name, order in ranked.items()]


if __name__ == "__main__":
    main()
