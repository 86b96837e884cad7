"""Recipes and their controls of equal bytes: divergence and perplexity on held-out rows, and tasks, all beside the
unquantized model.

    python evals/benchmarks/recipes.py MODEL --lines FILE.jsonl [--text NAME=FILE ...] [--held-out 12]
                                       [--only NAME ...] [--no-controls] [--set calibration.rows=16 ...]
                                       [--tasks NAME ... --task-folder FOLDER --limit 100]
    python evals/benchmarks/recipes.py MODEL --lines FILE.jsonl --table

Every row of `ROWS` is a packaged recipe, or the default one, with some of its keys changed, and is measured twice: as
it is, and as the sink-unaware control that `quantize-model run` makes, where that is another model. A line that is in
the file is not measured again, but in tasks that it lacks. `--only`: names of rows, or words that they hold. `--table`
prints what is there: of every task the difference from the unquantized model, paired by document, and the control's
from the recipe's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path

import torch
from measure import Line, Lines, beside, held_out_texts, sink_map_of, task_cell, united
from task_scores import add_options, task_scores

from sinkquant.artifacts import Plan
from sinkquant.evaluate import compare_rows
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_control, make_plan
from sinkquant.recipe import Recipe

PLAIN = "unquantized"
PRUNED = ["weights.ignore=['*']", "prune.method=sparsegpt"]
ROWS: dict[str, tuple[str | None, list[str]]] = {
    "4 bits, GPTQ": ("w4a16-sink", []),
    "4 bits, GPTAQ": ("w4a16-sink", ["weights.method=gptaq"]),
    "4 bits, AWQ": ("w4a16-sink-rtn", []),
    "4 bits, RTN": ("w4a16-sink-rtn", ["weights.smooth=none"]),
    "3 bits, GPTQ": ("w3a16-sink", ["weights.method=gptq"]),
    "3 bits, GPTAQ": ("w3a16-sink", []),
    "3 bits, AWQ": ("w4a16-sink-rtn", ["weights.bits=3"]),
    "3 bits, RTN": ("w4a16-sink-rtn", ["weights.bits=3", "weights.smooth=none"]),
    "2 bits, GPTQ": ("w2a16-sink", []),
    "2 bits, GPTAQ": ("w2a16-sink", ["weights.method=gptaq"]),
    "2 bits, AWQ": ("w4a16-sink-rtn", ["weights.bits=2"]),
    "2 bits, RTN": ("w4a16-sink-rtn", ["weights.bits=2", "weights.smooth=none"]),
    "4 bits, GPTQ, distilled": ("w4a16-sink", ["weights.distill=24"]),
    "3 bits, GPTAQ, distilled": ("w3a16-sink", ["weights.distill=24"]),
    "2 bits, GPTQ, distilled": ("w2a16-sink", ["weights.distill=24"]),
    "W8A8, a scale per token": ("w8a8-sink", []),
    "W8A8, stored scales": ("w8a8-static-sink", []),
    "W4A8": ("w4a8-sink", []),
    "KV cache, 4 bits": ("kv4-sink", []),
    "KV cache, 3 bits": ("kv3-sink", []),
    "KV cache, 2 bits": ("kv2-sink", []),
    "half of the weights": (None, PRUNED),
    "2:4": (None, [*PRUNED, "prune.pattern='2:4'"]),
    "8 bits per channel, super weights exact": ("w8a16-sink-rtn", ["protect.channels=split"]),
    "4 bits, RTN, super weights exact": ("w4a16-sink-rtn", ["weights.smooth=none", "protect.channels=split"]),
}
"""Name -> packaged recipe and what is changed in it."""


def main() -> None:
    """Measure what is not there yet, or print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lines", type=Path, required=True, help="one JSON object per line; gone on with")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--held-out", type=int, default=12, help="rows of every text")
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of every recipe")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    add_options(parser)
    arguments = parser.parse_args()
    lines = Lines(arguments.lines)
    if not arguments.table:
        measure(arguments, lines)
    print(table(lines.lines))


def measure(arguments: argparse.Namespace, lines: Lines) -> None:
    """Add a line for every model and text that has none."""
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    score = task_scores(arguments, tokenizer)
    shape = Decoder.of(open_model(folder)).shape(arguments.model)
    recipe = Recipe().replace(["detect.super_weights=false", *arguments.set])
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    plain = {name: {"model": PLAIN, "sinks": ""} | ({"text": name} if name else {}) for name in texts}
    missing = lines.missing(plain.values(), arguments.tasks)
    if missing or not all(lines.has(labels) for labels in plain.values()):
        scores = score(base, None, missing) if score and missing else None
        for name, labels in plain.items():
            lines.add(Line.of(labels, compare_rows(base, base, texts[name]), scores=scores))

    def plans(name: str) -> Iterator[tuple[str, Plan]]:
        source, changed = ROWS[name]
        asked = (Recipe.load(source) if source else Recipe()).replace([*changed, *arguments.set])
        aware = make_plan(shape, sink_map, asked)
        yield "aware", aware
        control = make_control(shape, sink_map, asked, aware)
        if not arguments.no_controls and carried_out(control) != carried_out(aware):
            yield "control", control

    for name in ROWS:
        if any(name == words or (words in name and words not in ROWS) for words in arguments.only):
            for sinks, plan in plans(name):
                lines.measure({"model": name, "sinks": sinks}, folder, base, plan, tokenizer, texts, tasks=score)
                print(f"{name}, {sinks}", flush=True)


def carried_out(plan: Plan) -> dict[str, object]:
    """What of a plan decides the model that is made of it: two that agree in that are one model."""
    modules = {name: decision.model_dump(exclude={"reason"}) for name, decision in plan.modules.items()}
    weighed = plan.needs_rows and plan.calibration.statistics != "all"
    return {"modules": modules, "sinks": plan.calibration.sinks if weighed else [], "ranges": plan.calibration.ranges,
            **plan.model_dump(include={"transforms", "kv_cache"})}


def table(lines: Sequence[Line]) -> str:
    """Markdown: models in rows; every text's divergence and perplexity, and every task, with paired intervals."""
    lines = united(lines)
    texts = list(dict.fromkeys(line.labels.get("text", "") for line in lines))
    tasks = list(dict.fromkeys(task for line in lines for task in line.scores or ()))
    found = {(line.labels["model"], line.labels["sinks"], line.labels.get("text", "")): line for line in lines}
    head = ["model", "sinks", *(f"KL, {text or 'nats'}" for text in texts),
            *(f"perplexity, {text}".rstrip(", ") for text in texts), *tasks]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for model, sinks in dict.fromkeys((line.labels["model"], line.labels["sinks"]) for line in lines):
        mine = [found.get((model, sinks, text)) for text in texts]
        known = {"control": (model, "aware"), "aware": (PLAIN, ""), "": ("", "")}[sinks]
        cells = [_divergence(one, found.get((*known, text)) if sinks == "control" else None)
                 for one, text in zip(mine, texts, strict=True)]
        cells += ["" if one is None else f"{exp(sum(one.loss) / len(one.loss)):.3g}" for one in mine]
        scores = next((one.scores for one in mine if one and one.scores), {})
        others = next((line.scores for text in texts if (line := found.get((*known, text))) and line.scores), {})
        cells += [task_cell(task, scores.get(task), others.get(task)) for task in tasks]
        rows.append([model, sinks, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _divergence(line: Line | None, aware: Line | None) -> str:
    """Mean over rows; beside a recipe's own also the interval of the difference."""
    return "" if line is None else beside(line.kl, None if aware is None else aware.kl)


if __name__ == "__main__":
    main()
