"""Which engines load what a plan makes: what the schemes' rows of the engine table say, and what only a whole model
tells."""

from __future__ import annotations

from collections.abc import Mapping

from sinkquant.artifacts import LinearShape, ModelShape
from sinkquant.schemes import INTEGERS, WeightFormat, scheme_of

OWN = "sinkquant"


def loads_in(shape: ModelShape, formats: Mapping[str, WeightFormat], own: bool) -> list[str]:
    """The engines that load every linear of a checkpoint, in the order of the table.

    Args:
        formats: module name -> format of every packed linear. own: the checkpoint is in sinkquant's own format.
    """
    if own:
        return [OWN]
    schemes = dict.fromkeys(scheme_of(form) for form in formats.values()) or [INTEGERS]
    named = list(dict.fromkeys(row.engine for scheme in schemes for row in scheme.loads))
    found = [engine for engine in named if all(_takes(engine, form) for form in formats.values())]
    superfluous = {row.engine for scheme in schemes for row in scheme.loads if row.instead_of in found}
    found = [engine for engine in found if engine not in superfluous]
    if any(linear.part_of for linear in shape.linears.values()) and not _experts_by_name(shape, formats):
        found = [engine for engine in found if not engine.startswith("vllm")]
    return found


def engine_loads(engine: str, form: WeightFormat, linear: LinearShape) -> bool:
    """Whether a budget for `engine` ("any" or one of the table) may use a packed format. What is split or stored
    transposed takes sinkquant's own format."""
    if engine in ("any", OWN):
        return True
    return not (form.split or linear.transposed) and _takes(engine, form)


def _takes(engine: str, form: WeightFormat) -> bool:
    return any(engine in row.names and row.takes(form) for row in scheme_of(form).loads)


def _experts_by_name(shape: ModelShape, formats: Mapping[str, WeightFormat]) -> bool:
    """Whether every expert is packed under the name that vLLM asks for: one tensor each, as most families call it."""
    return all(name in formats and name.endswith("_proj")
               for name, linear in shape.linears.items() if linear.part_of)
