"""GPTAQ, GPTQ with asymmetric calibration (Li et al. 2504.02692)."""

from __future__ import annotations

from sinkquant.methods.gptq import GPTQMethod


class GPTAQMethod(GPTQMethod):
    """GPTQ that also makes up for what earlier blocks lost: the difference between what the unquantized model would
    feed a linear and what it gets. Without that difference it is GPTQ."""

    name = "gptaq"
    needs_unquantized_inputs = True
