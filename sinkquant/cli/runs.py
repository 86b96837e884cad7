"""The command that does the whole job."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.cli.paper import paragraph
from sinkquant.cli.parts import FullOption, SensitivityOption, SetOption, TaskFolderOption, TrustOption, shown_progress
from sinkquant.cli.show import show_plan, show_report
from sinkquant.errors import RequestError
from sinkquant.models import resolve
from sinkquant.recipe import DEFAULT_RECIPE, Recipe

BESIDE_A_PLAN = {"name", "description", "seed", "compute", "detect", "evaluate", "gate"}
"""Sections of a recipe that decide something beside a plan: the seed, which rows and documents are drawn."""


def run(recipe: Annotated[str | None, typer.Argument(help="A recipe file or the name of a packaged one; "
                                                          "default: " + DEFAULT_RECIPE + ".")] = None,
        model: Annotated[str, typer.Option("-m", "--model", help="A model folder, a hub id, or 'demo'.")] = "demo",
        output: Annotated[Path, typer.Option("-o", "--output", help="The run's folder; must not exist yet.")] =
        Path("out"),
        assignments: SetOption = None,
        task_folder: TaskFolderOption = None,
        plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan, edited or not, with the "
                                                                      "recipe that it was made with.")] = None,
        sink_map: Annotated[Path | None, typer.Option(help="A sink map made before; default: detect.")] = None,
        sensitivity: SensitivityOption = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, and keep this one if it "
                                                              "is interrupted.")] = False,
        plan_only: Annotated[bool, typer.Option("--plan-only", help="Stop before anything is quantized.")] = False,
        full: FullOption = False, trust_remote_code: TrustOption = False) -> None:
    """Detect, plan, quantize, save, evaluate, report."""
    edited = Plan.load(plan_file) if plan_file else None
    known = SinkMap.load(sink_map) if sink_map else None
    output = Path(os.path.expanduser(output))
    chosen = _recipe_of_run(recipe, edited, assignments or [], sensitivity is not None)
    if task_folder:
        chosen = chosen.changed(evaluate={"task_folder": str(task_folder)})
    resolve(model)
    from sinkquant.models.processes import this_process
    from sinkquant.run import run as run_pipeline
    from sinkquant.run.folder import MODEL

    with shown_progress() as progress:
        report = run_pipeline(chosen, model, output, edited=edited, sink_map=known, sensitivity=sensitivity,
                              plan_only=plan_only, resume=resume, trust_remote_code=trust_remote_code,
                              progress=progress)
    if this_process()[0] > 0:
        return
    if report is None:
        show_plan(Plan.load(output / "plan.json"), full)
        paragraph(f"Plan: {output / 'plan.json'}")
        if not plan_only:
            paragraph(f"Checkpoint, not evaluated: {output / MODEL}")
            paragraph(f"To evaluate it: {shlex.join(['quantize-model', 'eval', str(output), '--baseline', model])}")
        return
    show_report(report)
    paragraph(f"Report: {output / 'report.html'}")
    if report.verdict.gate == "failed":
        raise typer.Exit(3)


def _recipe_of_run(recipe: str | None, edited: Plan | None, assignments: list[str], predicts: bool) -> Recipe:
    if edited is None:
        return Recipe.load(recipe or DEFAULT_RECIPE).replace(assignments)
    if recipe is not None:
        raise RequestError("a plan brings the recipe that it was made with; give --plan or a recipe, not both.")
    free = BESIDE_A_PLAN | ({"sensitivity"} if predicts else set())
    for assignment in assignments:
        if assignment.partition("=")[0].strip().partition(".")[0] not in free:
            raise RequestError(f"--set {assignment} would change nothing beside --plan; edit the plan instead.")
    return Recipe.parse(edited.recipe, "the recipe in the plan").replace(assignments)
