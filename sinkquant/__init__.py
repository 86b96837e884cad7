"""sinkquant: find the attention sinks, decide what to keep exact, quantize the rest, prove it."""

from typing import TYPE_CHECKING

from sinkquant.formats.registration import register_own_format
from sinkquant.lazy import make_lazy

if TYPE_CHECKING:
    from sinkquant.advise import advise
    from sinkquant.artifacts import Comparison, Diagnosis, Explanation, Plan, Report, Sensitivity, SinkMap
    from sinkquant.blocks import choose_blocks, cut_blocks, drop_blocks
    from sinkquant.compare import compare
    from sinkquant.detect import detect
    from sinkquant.diagnose import diagnose
    from sinkquant.errors import RequestError, SinkquantError
    from sinkquant.evaluate import evaluate
    from sinkquant.explain import explain
    from sinkquant.formats import load, save
    from sinkquant.heads import cut_heads
    from sinkquant.imatrix import imatrix
    from sinkquant.inference import Packing, packing
    from sinkquant.quantize import quantize
    from sinkquant.recipe import Recipe
    from sinkquant.run import plan, run
    from sinkquant.sensitivity import find_sensitivity

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Diagnosis",
    "Explanation",
    "Packing",
    "Plan",
    "Recipe",
    "Report",
    "RequestError",
    "Sensitivity",
    "SinkMap",
    "SinkquantError",
    "advise",
    "choose_blocks",
    "compare",
    "cut_blocks",
    "cut_heads",
    "detect",
    "diagnose",
    "drop_blocks",
    "evaluate",
    "explain",
    "find_sensitivity",
    "imatrix",
    "load",
    "packing",
    "plan",
    "quantize",
    "run",
    "save",
]

make_lazy(__name__)
register_own_format()
