"""Checkpoint -> Report, with lm-eval, beside the unquantized model and a control of the same size."""

from typing import Any

from sinkquant.evaluate.candidate import BASELINE, Candidate
from sinkquant.evaluate.divergence import (
    Divergence,
    TokenFigures,
    compare_rows,
    held_out_rows,
    row_divergences,
    token_figures,
)
from sinkquant.evaluate.evaluate import Compare, evaluate
from sinkquant.evaluate.forecasts import forecasts_of_plans, forecasts_of_run
from sinkquant.evaluate.requests import require_tasks_possible
from sinkquant.evaluate.results import TaskResult
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.evaluate.tasks import LOCAL_TASKS, build_tasks

__all__ = [
    "BASELINE",
    "LOCAL_TASKS",
    "Candidate",
    "Compare",
    "Divergence",
    "SinkLM",
    "TaskResult",
    "TokenFigures",
    "build_tasks",
    "compare_rows",
    "evaluate",
    "forecasts_of_plans",
    "forecasts_of_run",
    "held_out_rows",
    "paired_difference",
    "require_tasks_possible",
    "row_divergences",
    "run_tasks",
    "token_figures",
]


def __getattr__(name: str) -> Any:
    """`SinkLM` and `run_tasks` bring lm-eval with them: 130 MB that nothing but evaluation needs."""
    if name == "SinkLM":
        from sinkquant.evaluate.harness import SinkLM

        return SinkLM
    if name == "run_tasks":
        from sinkquant.evaluate.run import run_tasks

        return run_tasks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
