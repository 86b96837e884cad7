"""Decisions of a plan that do not go together; known before anything is computed."""

from __future__ import annotations

from sinkquant.artifacts.plan import Plan
from sinkquant.errors import RequestError
from sinkquant.schemes import scheme_of


def check_conflicts(plan: Plan) -> None:
    """Refuse packed linears whose storage cannot hold what else the plan does to them.

    Raises:
        RequestError: zeros beside columns that are split, or in codes that have none; tuning of what is not tuned.
    """
    silenced = {head.module for head in plan.silenced_heads}
    for name, decision in plan.modules.items():
        if decision.bits >= 16:
            continue
        scheme, zeros = scheme_of(decision.form), decision.prune is not None or name in silenced
        if zeros and decision.form.split:
            raise RequestError(f"the plan both prunes and splits {name}; it can do one of the two.")
        if zeros and decision.bits < scheme.zero_from:
            raise RequestError(f"the plan prunes {name}, and {scheme.words} of {decision.bits} bits have no code for "
                               f"zero; give it {scheme.zero_from} bits, or do not prune it.")
        if plan.calibration.tune and not scheme.tunable:
            raise RequestError(f"the plan tunes {name}, and {scheme.words} are not tuned; set calibration.tune to 0.")
