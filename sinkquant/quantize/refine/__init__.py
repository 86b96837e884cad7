"""Refinement: gradients change the codes and scales that a method has chosen.

`Tune` works on one block after the other, `Distill` on the whole model; they share the descent (`refine`) and the codes
and scales on their way (`Offsets`), and differ in what they lower.
"""

from sinkquant.quantize.refine.distill import Distill, TeacherTargets
from sinkquant.quantize.refine.offsets import Offsets, compressed, decompressed, rounding_offsets
from sinkquant.quantize.refine.refine import Objective, Refined, refine
from sinkquant.quantize.refine.tune import Tune
