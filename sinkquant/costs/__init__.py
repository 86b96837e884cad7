"""What every stage counts its memory and time with: sizes of a model under a recipe, and what a machine takes.

The counting itself stands with each stage, in its `costs.py`; a method's in its `cost`. `predict` adds up.
"""

from sinkquant.costs.pace import Pace, Rate
from sinkquant.costs.sizes import KEPT_BY_ALLOCATOR, PIECES, SPILL_SHARE, Sizes, by_input
