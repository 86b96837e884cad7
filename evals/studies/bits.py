"""What quantization does to the sinks, by bits: lm-eval rows, diagnostics and sink fidelity of one model.

    python evals/studies/bits.py [MODEL] [--bits 8 4 3 2] --output evals/studies/bits

Writes OUTPUT/report.json (every row beside the unquantized model), OUTPUT/diagnosis-BITS.json and OUTPUT/table.md. The
weights are quantized by the packaged recipe of that name where there is one, else by the default recipe at those bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sinkquant import Diagnosis, Report
from sinkquant.artifacts.base import write_atomically
from sinkquant.detect import detect
from sinkquant.diagnose import diagnose, sink_fidelity
from sinkquant.evaluate import BASELINE, Candidate, evaluate
from sinkquant.models import Decoder, load_model, load_tokenizer, resolve
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

RECIPES = {8: "w8a16-sink-rtn", 4: "w4a16-sink", 3: "w3a16-sink", 2: "w2a16-sink"}


def recipe_for(bits: int) -> Recipe:
    """The packaged recipe at so many bits, or the default one set to them."""
    return Recipe.load(RECIPES.get(bits, "w4a16-sink")).replace([f"weights.bits={bits}"])


def table(report: Report, diagnoses: dict[str, Diagnosis]) -> str:
    """Three Markdown tables: accuracy, fidelity, diagnostics."""
    names = [row.name for row in report.rows]
    metrics = list(dict.fromkeys((task, metric) for row in report.rows for task, found in row.tasks.items()
                                 for metric in found))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names),
             f"| bytes | {' | '.join(f'{row.weight_bytes:,}' for row in report.rows)} |"]
    for task, metric in metrics:
        measures = [row.tasks.get(task, {}).get(metric) for row in report.rows]
        cells = ["" if m is None else f"{m.value:.4g}" + (f" ± {m.stderr:.2g}" if m.stderr else "") for m in measures]
        lines.append(f"| {task} {metric} | {' | '.join(cells)} |")
    compared = report.fidelity.comparisons if report.fidelity else {}
    lines += ["", f"| sink fidelity | null | {' | '.join(compared)} |", "|---|---:|" + "---:|" * len(compared),
              f"| verdict | | {' | '.join(one.verdict for one in compared.values())} |"]
    for first in next(iter(compared.values())).checks:
        found = [one.check(first.name) for one in compared.values()]
        cells = [("" if c.value is None else f"{c.value:.3g}") + (" (out)" if c.kept is False else "") for c in found]
        lines.append(f"| {first.what} | {first.null:.2g} | {' | '.join(cells)} |")
    lines += ["", f"| diagnostic | {' | '.join(diagnoses)} |", "|---|" + "---:|" * len(diagnoses)]
    for words, figure in FIGURES.items():
        lines.append(f"| {words} | {' | '.join(figure(one) for one in diagnoses.values())} |")
    return "\n".join(lines) + "\n"


def _without_bos(one: Diagnosis) -> str:
    return next((f"{v.loss_increase.value:.3f}" for v in one.bos if v.name == "none"), "")


def _worst_attack(one: Diagnosis) -> str:
    costs = {check.loss - check.reference_loss: check.name for check in one.robustness if check.loss is not None}
    return f"{max(costs):.2f} ({costs[max(costs)]})" if costs else ""


FIGURES: dict[str, Callable[[Diagnosis], str]] = {
    "sink rate at 0.3, T = 64": lambda d: f"{d.sink_rates[0].rates['0.3'].value:.3f}",
    "the same, one token repeated": lambda d: f"{d.sink_rates[-1].rates['0.3'].value:.3f}",
    "largest massive activation / median": lambda d: f"{d.massive_ratio:.0f}",
    "mu / norm after the last block, without sinks": lambda d: f"{d.mixing[-1].mu_ratio_without_sinks.value:.3f}",
    "row entropy of the last block": lambda d: (f"{d.mixing[-1].row_entropy.value:.3f}" if d.mixing[-1].row_entropy
                                                else "none"),
    "paths to the last token that start at a sink": lambda d: f"{d.over_squashing.sink_share.value:.4f}",
    "spread of a swapped token": lambda d: " / ".join(
        f"{s.strength.value:.3f} {'with' if s.with_bos else 'without'} bos" for s in d.spread),
    "loss without bos, nats more": _without_bos,
    "dormant heads": lambda d: str(len(d.dormant_heads)),
    "worst attack, nats more": _worst_attack,
    "outputs finite under every attack": lambda d: "yes" if all(c.finite for c in d.robustness) else "no"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.monotonic()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    sink_map = detect(base, tokenizer, recipe=Recipe().replace(["detect.super_weights=false"]), name=arguments.model)
    shape = Decoder.of(load_model(folder)).shape(arguments.model)
    plans = {f"{bits} bits": make_plan(shape, sink_map, recipe_for(bits)) for bits in arguments.bits}
    models = {BASELINE: base}
    for name, plan in plans.items():
        models[name] = load_model(folder, torch.float32)
        quantize(models[name], plan, tokenizer)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    candidates = [Candidate(name, name, partial(models.__getitem__, name),
                            plans[name].weight_bytes if name in plans else size,
                            plans[name].bits_per_weight if name in plans else 16.0) for name in models]
    report = evaluate(candidates, tokenizer, Recipe(), model=arguments.model, compare=lambda original, other:
                      sink_fidelity(original, other, tokenizer, sink_map.tokens))
    report.save(arguments.output / "report.json")
    diagnoses = {}
    for name, model in models.items():
        diagnoses[name] = diagnose(model, tokenizer, name=f"{arguments.model}, {name}", sink_map=sink_map)
        diagnoses[name].save(arguments.output / f"diagnosis-{name.split()[0]}.json")
    write_atomically(arguments.output / "table.md", table(report, diagnoses))
    print(f"{arguments.output / 'table.md'} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
