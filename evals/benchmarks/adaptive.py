"""Does stopping early change verdicts? The evaluation's stopping rule on the divergences of real rows.

    python evals/benchmarks/adaptive.py RUN [RUN ...] [-o FILE.json] [--markdown FILE.md]

RUN is the folder of a finished run of `quantize-model run`, with its control. All pairs of the table are measured on
`--rows` rows once; then the rule is replayed on them:

- verdicts: rows are put into so many orders, by seed, and the rule stops where it stops; is its verdict that of all
  rows?
- error: two models that are as good as each other are made of every pair by taking the mean off the differences, which
  leaves them as skewed as they are; 64 of these are drawn with replacement; how often does a look say that one model is
  better?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from sinkquant.artifacts import Plan
from sinkquant.evaluate.candidate import BASELINE, DECIDED, Candidate
from sinkquant.evaluate.divergence import BATCH_ROWS, compare_side_by_side, held_out_rows
from sinkquant.evaluate.looks import ERROR, interval, looks, settled
from sinkquant.evaluate.states import last_states
from sinkquant.models import load_model, load_tokenizer, max_length, read_text, resolve, vocabulary_of
from sinkquant.recipe import Recipe
from sinkquant.run.candidates import loader, mechanisms

SEEDS = 20
PRECISION = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--model", default="demo", help="the unquantized model of all runs")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--trials", type=int, default=4000, help="of the error rate")
    parser.add_argument("--known", type=Path, help="divergences that were measured before, instead of runs")
    parser.add_argument("-o", "--output", type=Path, help="write the divergences here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    given = parser.parse_args()
    pairs = json.loads(given.known.read_text()) if given.known else {}
    for run in given.runs:
        pairs |= divergences(run, given.model, given.rows)
    if given.output:
        given.output.write_text(json.dumps(pairs) + "\n")
    lines = table(pairs, given.trials)
    print("\n".join(lines))
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


def divergences(run: Path, model: str, count: int) -> dict[str, list[list[float]]]:
    """"run: a - b" -> the divergences of a and of b, row by row."""
    folder = resolve(model)
    plans = [Plan.load(run / "plan.json"), Plan.load(run / "plan-control.json")]
    recipe = Recipe.parse(plans[0].recipe, "the plan's recipe").replace([f"evaluate.divergence_rows={count}"])
    candidates = [Candidate(BASELINE, model, lambda: load_model(folder, torch.float32, "cpu"), 0, 16.0)]
    for place, plan in zip(("model", "model-control"), plans, strict=True):
        load = loader(run / place, torch.float32, "cpu")
        candidates.append(Candidate(plan.name, place, load, 0, plan.bits_per_weight, plan.kv_cache))
    if plans[0].kv_cache is not None and plans[0].bits_per_weight < 16:
        candidates += mechanisms(candidates, plans, load_tokenizer(folder))
    loaded = {one.load: one.load() for one in candidates}
    base = loaded[candidates[0].load]
    rows = held_out_rows(vocabulary_of(base), load_tokenizer(folder), read_text(recipe.evaluate.text, "evaluation"),
                         recipe, max_length(base))
    batches = rows.split(BATCH_ROWS)
    states = [last_states(base, batch) for batch in batches]
    found = compare_side_by_side(base, states, [(loaded[one.load], one.kv) for one in candidates[1:]], batches)
    by_name = {one.name: figures.kl for one, figures in zip(candidates[1:], found, strict=True)}
    return {f"{run.name}: {a} - {b}": [by_name[a], by_name[b]] for a, b in DECIDED if {a, b} <= set(by_name)}


def table(pairs: dict[str, list[list[float]]], trials: int) -> list[str]:
    """Markdown lines."""
    lines = [f"Looks at {', '.join(str(look.rows) for look in looks(64, PRECISION))} rows, precision {PRECISION:.0%}, "
             f"{SEEDS} orders of the rows, {trials} trials without a difference.", "",
             "| pair | difference of all rows, nats | verdict of all rows | orders with the same verdict | opposite "
             "verdicts | rows used, mean (least, most) | error at no difference |",
             "|---|---:|---|---:|---:|---:|---:|"]
    for name, (a, b) in pairs.items():
        first, second = np.array(a), np.array(b)
        whole = interval(list(first - second), ERROR)
        verdicts, used = zip(*(replay(first, second, seed) for seed in range(SEEDS)), strict=True)
        same = sum(verdict == sign(whole.low, whole.high) for verdict in verdicts)
        opposite = sum(verdict * sign(whole.low, whole.high) < 0 for verdict in verdicts)
        lines.append(f"| {name} | {whole.mean:.3g}, {whole.low:.3g} to {whole.high:.3g} | "
                     f"{ANSWERS[sign(whole.low, whole.high)]} | {same} of {SEEDS} | {opposite} | "
                     f"{np.mean(used):.1f} ({min(used)}, {max(used)}) | {error_rate(first, second, trials):.3f} |")
    return lines


ANSWERS = {1: "pays", -1: "does not pay", 0: "no difference shown"}


def sign(low: float, high: float) -> int:
    """1 above 0, -1 below, 0 across."""
    return int(low > 0) - int(high < 0)


def replay(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[int, int]:
    """The verdict of the rule on rows in another order, and the rows that it took."""
    order = np.random.default_rng(seed).permutation(len(a))
    a, b = a[order], b[order]
    for look in looks(len(a), PRECISION):
        if settled(list(a[:look.rows]), list(b[:look.rows]), look.level, PRECISION):
            break
    found = interval(list(a[:look.rows] - b[:look.rows]), look.level)
    return sign(found.low, found.high), look.rows


def error_rate(a: np.ndarray, b: np.ndarray, trials: int) -> float:
    """How often a look is certain of a difference where there is none."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(trials):
        wrong += _errs((a - b - (a - b).mean())[generator.integers(len(a), size=64)])
    return wrong / trials


def _errs(differences: np.ndarray) -> bool:
    return any(interval(list(differences[:look.rows]), look.level).certain for look in looks(64, PRECISION))


if __name__ == "__main__":
    main()
