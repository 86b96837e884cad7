"""Does it pay to keep sink channels exact? `protect.channels` beside controls of the same bytes: mean KL divergence and
perplexity on held-out rows, with paired intervals.

    python evals/benchmarks/channels.py MODEL [--methods rtn gptq] [--bits 4 3 2] [--set KEY=VALUE ...]
                                        [--channels split module scale] [--held-out 32] [--lines FILE.jsonl]

"evenly": the bytes that protection costs are spent on more bits or smaller groups all over the model, as a run's
control does. "elsewhere": as many columns of the same linears drawn at random (split), or other linears of the same
shape (module). Tokens weigh the same in all lines of a method.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Lines, held_out_texts, sink_map_of, table

from sinkquant.artifacts import ModelShape, Plan, SinkMap
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_control, make_plan
from sinkquant.recipe import Recipe


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--channels", nargs="+", default=["split", "module", "scale"])
    parser.add_argument("--held-out", type=int, default=32, help="held-out rows")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--lines", type=Path, help="keep what was measured here (measure.py)")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    base, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    recipe = Recipe().replace(["detect.super_weights=false", *arguments.set])
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    shape, stored = (Decoder.of(model).shape(arguments.model) for model in (base, open_model(folder)))
    lines = Lines(arguments.lines)
    for bits, method in itertools.product(arguments.bits, arguments.methods):
        asked = recipe.replace([f"weights.bits={bits}", f"weights.method={method}"])
        for kept, where, plan in plans(shape, sink_map, asked, arguments.channels):
            labels = {"bits": str(bits), "method": method, "kept exact": kept, "bytes spent on": where}
            lines.measure(labels, folder, base, plan, tokenizer, texts, checkpoint_bytes(stored, plan.formats))
    print(table(lines.lines, ["bits", "method", "kept exact", "text"], recipe.seed))


def plans(shape: ModelShape, sink_map: SinkMap, recipe: Recipe,
          channels: list[str]) -> Iterator[tuple[str, str, Plan]]:
    """What is kept, where the bytes go, and the plan; the control first, with which the others are compared."""
    plain = make_plan(shape, sink_map, recipe)
    yield "nothing", "", plain
    for kept in channels:
        aware = make_plan(shape, sink_map, recipe.replace([f"protect.channels={kept}"]))
        if kept != "scale":  # which costs no bytes
            even = make_control(shape, sink_map, recipe, aware)
            yield kept, "evenly", even.model_copy(update={"calibration": plain.calibration})
        if kept == "split":
            yield kept, "elsewhere", other_columns(aware, shape, recipe.seed)
        if kept == "module":
            yield kept, "elsewhere", make_plan(shape, sink_map, recipe.replace(
                [f"protect.modules={other_modules(aware, shape)}"]))
        yield kept, "sinks", aware


def other_columns(aware: Plan, shape: ModelShape, seed: int) -> Plan:
    """As many columns of the same linears, drawn at random from those that are not kept."""
    draw, modules = random.Random(seed), dict(aware.modules)
    for name, decision in aware.modules.items():
        if decision.keep == "split":
            free = sorted(set(range(shape.linears[name].columns)) - set(decision.columns))
            columns = sorted(draw.sample(free, len(decision.columns)))
            modules[name] = decision.model_copy(update={"columns": columns})
    return aware.model_copy(update={"modules": modules})


def other_modules(aware: Plan, shape: ModelShape) -> list[str]:
    """For every linear that is kept another one of the same shape that is not."""
    kept = [name for name, decision in aware.modules.items() if decision.keep]
    found: list[str] = []
    for name in kept:
        size = (shape.linears[name].rows, shape.linears[name].columns)
        found.append(next(other for other, linear in reversed(shape.linears.items()) if other not in [*kept, *found]
                          and (linear.rows, linear.columns) == size
                          and other.rpartition(".")[2] == name.rpartition(".")[2]))
    return found


if __name__ == "__main__":
    main()
