"""The whole job, from model to report: what is asked for, its stages, and the folder that they fill."""

from sinkquant.run.pipeline import plan, run

__all__ = ["plan", "run"]
