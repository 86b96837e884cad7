"""Checkpoint -> Report, with lm-eval, beside the unquantized model and a control of the same size."""

from typing import TYPE_CHECKING

from sinkquant.evaluate.candidate import BASELINE, Candidate, TaskResult
from sinkquant.evaluate.divergence import Divergence, TokenFigures, compare_rows, held_out_rows, token_figures
from sinkquant.evaluate.evaluate import Compare, evaluate, require_rows
from sinkquant.evaluate.forecasts import forecasts_of_plans, forecasts_of_run
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.evaluate.task_files import require_tasks_possible
from sinkquant.evaluate.tasks import LOCAL_TASKS, build_tasks
from sinkquant.lazy import make_lazy

if TYPE_CHECKING:  # lm-eval comes with them: 130 MB that nothing but evaluation needs
    from sinkquant.evaluate.harness import SinkLM

make_lazy(__name__)
