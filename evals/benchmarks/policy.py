"""What a solved budget is worth: the solved plan beside the uniform plan of the same bytes, and beside the same solver
fed with sensitivities that sum over all tokens and channels at once; how the cheap sensitivities rank against measured
ones; predicted against measured loss. Held-out rows, paired bootstrap intervals.

    python evals/benchmarks/policy.py MODEL [--bits 3.0 3.5 4.25] [--text FILE] [--heldout FILE] [--rows 64]
                                      [--set KEY=VALUE ...] [--measure-rows 0] [--sensitivity FILE]

Every plan is carried out with the same calibration and the same statistics of sink tokens; only the formats differ.
"solved": the solver with predicted losses. "solved, measured": with losses measured by forward passes, where
--measure-rows asks for them. "uniform": the fewest bits raised evenly over the model until the bytes of "solved" are
spent. "solved, diagonal": the solver with half of sum g^2 e^2, the score of tools that do not know of sinks.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import ModelShape, Plan, Sensitivity, SinkMap
from sinkquant.cli.tables.sensitivity import ranking_in_words
from sinkquant.detect import detect
from sinkquant.evaluate import Divergence, compare_rows, paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_control, make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe
from sinkquant.sensitivity import find_sensitivity


@dataclass(frozen=True)
class Job:
    """What every plan is made and measured with."""

    folder: Path
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    sink_map: SinkMap
    rows: torch.Tensor

    def measured(self, plan: Plan) -> Divergence:
        """Carry a plan out and compare the model with the unquantized one."""
        model = load_model(self.folder, torch.float32)
        quantize(model, plan, self.tokenizer)
        return compare_rows(self.base, model, self.rows)


def without_measured(found: Sensitivity) -> Sensitivity:
    """The same with the predicted losses alone."""
    return found.model_copy(update={"units": [unit.model_copy(update={"losses": [
        loss.model_copy(update={"measured": None}) for loss in unit.losses]}) for unit in found.units]})


def plans_of(job: Job, recipe: Recipe, costs: Sensitivity) -> dict[str, Plan]:
    """The plans of one budget, all with the calibration of the first."""
    cheap = without_measured(costs)
    solved = make_plan(job.shape, job.sink_map, recipe, cheap)
    found = {"solved": solved}
    if costs.ranking is not None:
        found["solved, measured"] = make_plan(job.shape, job.sink_map, recipe, costs)
    uniform = make_control(job.shape, job.sink_map, recipe, solved, cheap)
    found["uniform"] = uniform.model_copy(update={"calibration": solved.calibration})
    diagonal = make_plan(job.shape, job.sink_map, recipe.replace(["sensitivity.score=diagonal"]), cheap)
    return found | {"solved, diagonal": diagonal}


def perplexity_of(losses: list[float]) -> float:
    """Of rows with these mean losses, nats."""
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def main() -> None:
    """Print the tables as Markdown, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5, 4.25])
    parser.add_argument("--text")
    parser.add_argument("--heldout")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--measure-rows", type=int, default=0)
    parser.add_argument("--sensitivity", help="taken from this file, or written there")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    recipe = Recipe().replace([
        f"calibration.text={arguments.text or 'null'}", "detect.super_weights=false", "budget.solver=sensitivity",
        "budget.bits=4", f"sensitivity.measure_rows={arguments.measure_rows}", *arguments.settings])
    sink_map = detect(base, tokenizer, recipe=recipe)
    stored = Decoder.of(load_model(folder))
    rows = token_rows(tokenizer, read_text(arguments.heldout, "evaluation"), arguments.rows,
                      min(arguments.length, stored.max_length), recipe.calibration.bos)
    started = time.monotonic()
    costs = find_sensitivity(stored.model, tokenizer, sink_map, recipe, arguments.sensitivity)
    print(f"Sensitivities of {len(costs.units)} units: {time.monotonic() - started:.0f} s. "
          f"{' '.join(ranking_in_words(costs))}\n")
    print("| bits asked | plan | bytes | KL predicted | KL measured | more than solved, 95 % interval | perplexity | "
          "more than solved, 95 % interval |")
    print("|---:|---|---:|---:|---:|---|---:|---|", flush=True)
    job = Job(folder, base, tokenizer, stored.shape("benchmark"), sink_map, rows)
    ones = [1.0] * len(rows)
    unquantized: float | None = None
    for bits in arguments.bits:
        best: Divergence | None = None
        for name, plan in plans_of(job, recipe.replace([f"budget.bits={bits}"]), costs).items():
            found = job.measured(plan)
            best = best or found
            if unquantized is None:
                unquantized = perplexity_of(found.baseline_loss)
                print(f"| | unquantized | {plan.unquantized_bytes:,} | | | | {unquantized:.3f} | |")
            more = paired_difference("kl", (found.kl, ones), (best.kl, ones), 2000, arguments.seed)
            # The metric takes log-likelihoods, so that losses change their sign.
            loss, least = ([-value for value in one.other_loss] for one in (found, best))
            worse = paired_difference("perplexity", (loss, ones), (least, ones), 2000, arguments.seed)
            beside = ["", ""] if found is best else [
                f"{value:+.5f}, {low:+.5f} to {high:+.5f}" for value, low, high in (more, worse)]
            print(f"| {bits:g} | {name} | {plan.weight_bytes:,} | {plan.predicted.get('kl', float('nan')):.5f} | "
                  f"{sum(found.kl) / len(found.kl):.5f} | {beside[0]} | {perplexity_of(found.other_loss):.3f} | "
                  f"{beside[1]} |", flush=True)


if __name__ == "__main__":
    main()
