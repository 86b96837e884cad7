"""Checkpoint -> Report, with lm-eval, beside the unquantized model and a control of the same size."""

from sinkquant.evaluate.evaluate import BASELINE, Candidate, evaluate, require_tasks_possible
from sinkquant.evaluate.tasks import build_tasks

__all__ = ["BASELINE", "Candidate", "build_tasks", "evaluate", "require_tasks_possible"]
