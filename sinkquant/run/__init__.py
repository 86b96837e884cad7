"""The whole job, from model to report: what is asked for, its stages, and the folder that they fill."""

from typing import TYPE_CHECKING

from sinkquant.lazy import make_lazy

if TYPE_CHECKING:
    from sinkquant.run.pipeline import plan, run

make_lazy(__name__)
