"""Commands about plans: what two of them decide differently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkquant.artifacts import Plan, Sensitivity
from sinkquant.cli_parts import JsonOption, out
from sinkquant.errors import RequestError

PlanArgument = Annotated[Path, typer.Argument(help="A plan.json, a run's folder, or a quantized checkpoint.")]


def diff(a: PlanArgument, b: PlanArgument,
         sensitivity: Annotated[Path | None, typer.Option(help="Predict both losses from this file; default: what the "
                                                               "plans say.")] = None,
         json: JsonOption = False) -> None:
    """What two plans of one model decide differently, with the bytes and the predicted loss of each decision."""
    from sinkquant.policy.difference import compare_plans
    from sinkquant.policy.show import changes, settings, totals

    costs = Sensitivity.load(sensitivity) if sensitivity else None
    found = compare_plans(_plan_at(a), _plan_at(b), (str(a), str(b)), costs)
    if json:
        print(found.to_json(), end="")
        return
    out.print(totals(found))
    if found.modules:
        out.print(changes(found))
    if found.settings:
        out.print(settings(found))
    if not found.modules and not found.settings:
        out.print("The plans decide the same.")


def _plan_at(place: Path) -> Plan:
    if not place.is_dir():
        return Plan.load(place)
    if (place / "plan.json").is_file():
        return Plan.load(place / "plan.json")
    from sinkquant.formats import read_checkpoint

    content = read_checkpoint(place)
    if content is None:
        raise RequestError(f"{place} holds no plan; give a plan.json, a run's folder, or a checkpoint that sinkquant "
                           "wrote.")
    found: Plan = content["plan"]
    return found
