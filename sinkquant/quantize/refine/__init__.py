"""Refinement: gradients change the codes and scales that a method has chosen.

`tune` works on one block after the other, and `TeacherDivergence` is of the whole model; they share the descent
(`refine`) and what gradients change of a linear: codes and scales (`Offsets`), or scales alone (`Scales`, end to end).
They differ in what they lower.
"""

from sinkquant.quantize.refine.distill import TeacherDivergence, TeacherTargets
from sinkquant.quantize.refine.offsets import Offsets, compressed, decompressed, rounding_offsets
from sinkquant.quantize.refine.refine import Objective, Refined, Tuned, refine
from sinkquant.quantize.refine.scales import Scales
from sinkquant.quantize.refine.tune import tune
