"""Checkpoint -> Report, with lm-eval, beside the unquantized model and a control of the same size."""

from sinkquant.evaluate.divergence import Divergence, compare_rows, row_divergences
from sinkquant.evaluate.evaluate import BASELINE, Candidate, Compare, evaluate, require_tasks_possible
from sinkquant.evaluate.harness import SinkLM
from sinkquant.evaluate.run import TaskResult, run_tasks
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
    "build_tasks",
    "compare_rows",
    "evaluate",
    "paired_difference",
    "require_tasks_possible",
    "row_divergences",
    "run_tasks",
]
