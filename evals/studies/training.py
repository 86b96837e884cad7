"""Which training makes a model easier to quantize? Tiny models of every kind, several seeds each.

    python evals/studies/training.py evals/studies/training.yaml --text FOLDER --output evals/studies/training

Every model is trained, looked at (`detect`), and quantized with GPTQ to every number of bits, once with its sinks
weighted in the Hessians and once without (same bytes). FOLDER holds training text that shares no book with the packaged
calibration and evaluation texts. Runs that OUTPUT/runs.jsonl already holds are not repeated; the table is
OUTPUT/table.md, means over seeds with 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from scipy import stats
from torch import Tensor, float32
from transformers import PreTrainedTokenizerFast

from sinkquant.detect import detect
from sinkquant.evaluate import compare_rows
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo_model"))
from train import build, prepare, read_documents

ROWS = 32


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The base with a variant's keys over it; the model's shape key by key."""
    return base | change | {"model": base["model"] | change.get("model", {})}


def measure(folder: Path, bits: list[int]) -> dict[str, float]:
    """One trained model: loss on held-out text, its sinks, and what quantization costs it (mean KL, nats)."""
    model, tokenizer = load_model(folder, float32), load_tokenizer(folder)
    decoder = Decoder.of(model)
    settings = ["detect.super_weights=false", "detect.long_rows=0", "detect.rows=50", "calibration.rows=32",
                f"calibration.length={decoder.max_length}"]
    sink_map = detect(model, tokenizer, recipe=Recipe().replace(settings))
    rows = token_rows(tokenizer, read_text(None, "evaluation"), ROWS, decoder.max_length)
    found = {"loss": mean(compare_rows(model, model, rows).other_loss), "sink_rate": sink_map.sink_rate["0.3"],
             "sink_mass": mean([head.sink_score for layer in sink_map.heads for head in layer]),
             "massive": max((channel.ratio for channel in sink_map.channels), default=0.0)}
    for count in bits:
        for name, weight in (("plain", 1), ("aware", 16)):
            recipe = Recipe().replace([*settings, f"weights.bits={count}", "weights.group_size=32",
                                       f"protect.sink_weight={weight}"])
            other = load_model(folder, float32)
            quantize(other, make_plan(decoder.shape("study"), sink_map, recipe), tokenizer)
            found[f"kl {count} {name}"] = mean(compare_rows(model, other, rows).kl)
    return found


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def interval(values: list[float], digits: int) -> str:
    """Mean and the half width of its 95 % t-interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    spread = math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def table(runs: list[dict[str, Any]], bits: list[int]) -> str:
    """The results as Markdown, one line per variant; the gain is what weighting the sinks takes off the divergence."""
    costs = [f"KL at {count} bits" for count in bits] + [f"less with sinks weighted, {count} bits, %" for count in bits]
    head = ["training", "seeds", "loss", "sink rate", "mass on sinks", "massive ratio", *costs]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in dict.fromkeys(run["variant"] for run in runs):
        of = [run["found"] for run in runs if run["variant"] == name]
        cells = [interval([one[key] for one in of], digits) for key, digits in
                 (("loss", 3), ("sink_rate", 2), ("sink_mass", 2), ("massive", 0))]
        cells += [interval([one[f"kl {count} plain"] for one in of], 4) for count in bits]
        cells += [interval([100 * (1 - one[f"kl {count} aware"] / one[f"kl {count} plain"]) for one in of], 1)
                  for count in bits]
        lines.append("| " + " | ".join([name, str(len(of)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    documents, size = [], 0
    for document in read_documents(arguments.text):
        documents.append(document[: config["characters"] - size])
        size += len(documents[-1])
        if size >= config["characters"]:
            break
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "runs.jsonl"
    runs = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    prepared: dict[str, tuple[PreTrainedTokenizerFast, Tensor]] = {}
    # Seed by seed, so that an interrupted study holds every variant equally often.
    for seed in config["seeds"]:
        for name, change in config["variants"].items():
            if any((run["variant"], run["seed"]) == (name, seed) for run in runs):
                continue
            variant = merged(config["base"], change)
            if variant["bos"] not in prepared:
                prepared[variant["bos"]] = prepare(variant, documents)
            with tempfile.TemporaryDirectory() as folder:
                build(variant | {"seed": seed}, *prepared[variant["bos"]], Path(folder))
                runs.append({"variant": name, "seed": seed, "found": measure(Path(folder), config["bits"])})
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    (arguments.output / "table.md").write_text(table(runs, config["bits"]), encoding="utf-8")


if __name__ == "__main__":
    main()
