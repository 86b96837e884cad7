"""What a run will take, in memory and time, before it begins."""

from sinkquant.predict.predict import SENSITIVITIES, Prediction, predict, require_memory, spill_limit, with_seconds
