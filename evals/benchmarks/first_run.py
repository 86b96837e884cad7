"""What a first run takes: processor seconds, wall seconds and peak memory of every stage, as a table.

    python evals/benchmarks/first_run.py [MODEL] [--recipe NAME] [--set KEY.PATH=VALUE] [--report OUT]

Runs a recipe on a model (the bundled one unless another is named) and prints a row per stage, with the wall seconds
that were predicted. Processor seconds are those of all threads, and are the steadier figure where the machine has other
work. OMP_NUM_THREADS says how many threads there are. `--report` takes the figures of a run that is there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

import sinkquant as sq

HEAD = ("stage", "processor s", "wall s", "predicted s", "peak GB")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--recipe", default="w4-kv2-sink")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--report", type=Path, help="a run's folder; nothing is run")
    arguments = parser.parse_args()
    if arguments.report:
        found = sq.Report.load(arguments.report / "report.json")
    else:
        recipe = sq.Recipe.load(arguments.recipe).replace(arguments.set)
        with tempfile.TemporaryDirectory() as folder:
            report = sq.run(recipe, arguments.model, Path(folder) / "out")
        assert report is not None, "a run without evaluation has no report"
        found = report
    print(f"{found.recipe} on {found.model}, {torch.get_num_threads()} threads, {os.cpu_count()} processors\n")
    print("\n".join(table(found.resources)))


def table(resources: Mapping[str, float]) -> list[str]:
    """Markdown, a row per stage and one for all."""
    stages = [name.removeprefix("seconds: ") for name in resources if name.startswith("seconds: ")]
    rows = [HEAD, ("---", *["---:"] * (len(HEAD) - 1))]
    kinds = ("processor seconds: ", "seconds: ", "predicted seconds: ")
    for stage in stages:
        taken = [resources.get(f"{kind}{stage}") for kind in kinds]
        peak = resources.get(f"peak resident bytes: {stage}")
        rows.append((stage, *(_cell(one) for one in taken), "" if peak is None else f"{peak / 1e9:.2f}"))
    sums = [sum(resources.get(f"{kind}{stage}", 0.0) for stage in stages) for kind in kinds]
    rows.append(("all", *(_cell(one) for one in sums), f"{resources['peak resident bytes'] / 1e9:.2f}"))
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


if __name__ == "__main__":
    main()
