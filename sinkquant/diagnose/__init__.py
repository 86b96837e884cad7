"""What a model's sinks do for it: over-mixing diagnostics, fidelity after quantization, robustness.

A package of its own: it needs `detect` to know the sinks, and both `detect` (model -> SinkMap) and `evaluate`
(checkpoint -> Report) stay small without it.
"""

from sinkquant.diagnose.diagnose import diagnose
from sinkquant.diagnose.fidelity import sink_fidelity
