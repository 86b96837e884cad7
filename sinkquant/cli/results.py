"""Commands about what came of a run: it is measured again, and reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sinkquant.artifacts import Plan, Report, Sensitivity, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.cli.paper import paragraph
from sinkquant.cli.parts import (
    JsonOption,
    SetOption,
    TaskFolderOption,
    TextOption,
    TrustOption,
    one_text,
    printed,
    shown_progress,
    task_names,
    to_file,
)
from sinkquant.cli.show import show_report
from sinkquant.errors import RequestError


def evaluate(folder: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
             baseline: Annotated[str | None, typer.Option(help="The unquantized model.")] = None,
             text: TextOption = None, tasks: Annotated[str | None, typer.Option(help="Task names, by commas.")] = None,
             task_folder: TaskFolderOption = None, assignments: SetOption = None, json: JsonOption = False,
             sensitivity: Annotated[Path | None, typer.Option(help="Predict the losses from this file; default: what "
                                                                   "the plans say.")] = None,
             output: Annotated[Path | None, to_file("Write the report here.")] = None,
             trust_remote_code: TrustOption = False) -> None:
    """Measure a checkpoint with lm-eval, beside its baseline and its control: all documents, all rows."""
    asked: dict[str, Any] = {"limit": None, "sample": None, "precision": None}
    asked |= {"text": one_text(text)} if text else {}
    asked |= {"task_folder": str(task_folder)} if task_folder else {}
    asked |= {"tasks": task_names(tasks)} if tasks else {}
    if not folder.is_dir() and folder.suffix != ".gguf":
        raise RequestError(f"{folder} is no folder; give a run's folder, a checkpoint or a GGUF file.")
    if output is not None and output.suffix:
        from sinkquant.report.kinds import require_kind

        require_kind(output, (".json",))
    from sinkquant.evaluate.task_files import wanted_tasks
    from sinkquant.models.corpus import text_digest
    from sinkquant.models.processes import this_process
    from sinkquant.run.measure import evaluate_folder, recorded_recipe

    recorded = recorded_recipe(folder)
    recipe = recorded.changed(evaluate=asked).replace(assignments or [])
    try:
        text_digest(recipe.evaluate.text, "evaluation")
        if recipe.evaluate.task_folder is not None:
            wanted_tasks(recipe.evaluate)
    except RequestError as error:
        if all(getattr(recipe.evaluate, key) == getattr(recorded.evaluate, key) for key in ("text", "task_folder")):
            error.add_note("the run's recipe names it as it was called where the run was started; give --text or "
                           "--task-folder.")
        raise
    costs = Sensitivity.load(sensitivity) if sensitivity else None
    with shown_progress() as progress:
        made = evaluate_folder(folder, recipe, baseline, progress, costs, trust_remote_code)
    if this_process()[0] > 0:
        return
    if not printed(made, json, output):
        show_report(made)
        for note in made.notes:
            paragraph(f"Note: {note}.")
    if made.verdict.gate == "failed":
        raise typer.Exit(3)


def report(folders: Annotated[list[Path], typer.Argument(help="One run's folder, or several to compare.")],
           output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the page goes; of one run also a "
                                                                              "folder for all its files.")] = None,
           ) -> None:
    """Write a run's report again, or a page that compares several runs."""
    from sinkquant.report import comparison, page, write
    from sinkquant.report.kinds import require_kind

    output = output and Path(os.path.expanduser(output))
    if output is not None and output.suffix and not (len(folders) == 1 and output.is_dir()):
        require_kind(output, (".html",))
    bare = next((one for one in folders if (one / "plan.json").is_file() and not (one / "report.json").is_file()), None)
    if bare is not None:
        raise RequestError(f"the run in {bare} was not evaluated; quantize-model eval measures it, and writes what is "
                           f"reported with -o {bare / 'report.json'}.")
    reports = [(str(folder), Report.load(folder / "report.json")) for folder in folders]
    if len(folders) == 1:
        folder = folders[0]
        again = folder / "sinkmap-sink_aware.json"
        parts = (reports[0][1], SinkMap.load(folder / "sinkmap.json"), Plan.load(folder / "plan.json"),
                 SinkMap.load(again) if again.is_file() else None)
        if output is not None and output.suffix == ".html":
            place = write_atomically(output, page(*parts))
        else:
            write(output or folder, *parts)
            place = (output or folder) / "report.html"
        paragraph(f"Report: {place}")
        return
    place = write_atomically(output or Path("comparison.html"), comparison(reports))
    paragraph(f"Comparison: {place}")
