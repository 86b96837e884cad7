"""Which formats an engine loads."""

from __future__ import annotations

from sinkquant.artifacts import LinearShape
from sinkquant.artifacts.formats import WeightFormat

VLLM_BITS = frozenset({4, 8})
VLLM_GROUPS = frozenset({-1, 32, 64, 128})


def in_vllm(form: WeightFormat) -> bool:
    """Whether vLLM's documentation says that it loads a linear in this format."""
    return form.bits in VLLM_BITS and form.group_size in VLLM_GROUPS


def engine_loads(engine: str, form: WeightFormat, linear: LinearShape) -> bool:
    """Whether a budget for `engine` ("any", "vllm", "transformers" or "sinkquant") may use a packed format. What is
    split or stored transposed takes sinkquant's own format."""
    if engine in ("any", "sinkquant"):
        return True
    return not (form.split or linear.transposed) and (engine != "vllm" or in_vllm(form))
