"""quantize-model: the command line."""

from __future__ import annotations

import functools
import importlib.metadata
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.cli.models import cut, detect, diagnose, doctor
from sinkquant.cli.parts import SensitivityOption, SetOption, TrustOption, err, out, shown_progress
from sinkquant.cli.plans import advise, diff, plan, sensitivity
from sinkquant.cli.results import evaluate, report
from sinkquant.cli.show import show_plan, show_report
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import resolve
from sinkquant.recipe import DEFAULT_RECIPE, Recipe, recipe_names

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# typer carries its own copy of click or uses the installed one, by version; this names the right class in both.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Interrupted(Exception):
    """Ctrl-C, which typer would make an exit code of; with what the command says of what is left."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong request, 3 below the quality gate."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores Ctrl-C for its background jobs
        signal.signal(number, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except UsageError as error:
        code = _fail(f"{error.format_message()} See quantize-model --help.", 2)  # type: ignore[attr-defined]
    except SinkquantError as error:
        code = _fail(_with_notes(str(error), error), error.exit_code)
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        notes = getattr(error.__cause__, "__notes__", ["nothing half-written was left."])
        code = _fail("; ".join(["stopped before it was done", *notes]), 1)
    except MemoryError:
        code = _fail("out of memory; use a smaller calibration.batch_size or a larger machine.", 1)
    except OSError as error:
        code = _fail(_with_notes(f"{error.filename or 'input or output'}: {error.strerror or error}.", error), 1)
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        reason = " ".join(str(error).split()) or "no reason was given"
        code = _fail(_with_notes(f"unexpected {type(error).__name__}: {reason[:300]} (run with --traceback for all of "
                                 "it).", error), 1)
    sys.exit(code or 0)


@app.callback(invoke_without_command=True)
def top(context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
        traceback: Annotated[bool, typer.Option("--traceback", help="Show where an unexpected error arose.")] = False,
        ) -> None:
    """Find the attention sinks of a language model, keep them exact, quantize the rest, prove it."""
    if version:
        print(f"quantize-model {importlib.metadata.version('sinkquant')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def run(recipe: Annotated[str | None, typer.Argument(help="A recipe file or the name of a packaged one; "
                                                          "default: " + DEFAULT_RECIPE + ".")] = None,
        model: Annotated[str, typer.Option("-m", "--model", help="A model folder, a hub id, or 'demo'.")] = "demo",
        output: Annotated[Path, typer.Option("-o", "--output", help="The run's folder; must not exist yet.")] =
        Path("out"),
        assignments: SetOption = None,
        plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan, edited or not, with the "
                                                                      "recipe that it was made with.")] = None,
        sink_map: Annotated[Path | None, typer.Option(help="A sink map made before; default: detect.")] = None,
        sensitivity: SensitivityOption = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, and keep this one if it "
                                                              "is interrupted.")] = False,
        plan_only: Annotated[bool, typer.Option("--plan-only", help="Stop before anything is quantized.")] = False,
        trust_remote_code: TrustOption = False) -> None:
    """Detect, plan, quantize, save, evaluate, report."""
    edited = Plan.load(plan_file) if plan_file else None
    known = SinkMap.load(sink_map) if sink_map else None
    chosen = _recipe_of_run(recipe, edited, assignments or [])
    resolve(model)
    from sinkquant.models.processes import this_process
    from sinkquant.run import run as run_pipeline

    with shown_progress() as progress:
        report = run_pipeline(chosen, model, output, edited=edited, sink_map=known, sensitivity=sensitivity,
                              plan_only=plan_only, resume=resume, trust_remote_code=trust_remote_code,
                              progress=progress)
    if this_process()[0] > 0:
        return
    if report is None:
        show_plan(Plan.load(output / "plan.json"))
        out.print(f"Plan: {output / 'plan.json'}", soft_wrap=True, highlight=False)
        return
    show_report(report)
    out.print(f"Report: {output / 'report.html'}", soft_wrap=True, highlight=False)
    if report.verdict.gate == "failed":
        raise typer.Exit(3)


def _recipe_of_run(recipe: str | None, edited: Plan | None, assignments: list[str]) -> Recipe:
    if edited is None:
        return Recipe.load(recipe or DEFAULT_RECIPE).replace(assignments)
    if recipe is not None:
        raise RequestError("a plan brings the recipe that it was made with; give --plan or a recipe, not both.")
    for assignment in assignments:
        if assignment.partition(".")[0] in ("weights", "prune", "protect", "budget", "calibration"):
            raise RequestError(f"--set {assignment} would change nothing beside --plan; edit the plan instead.")
    return Recipe.parse(edited.recipe, "the recipe in the plan").replace(assignments)


def recipes(action: Annotated[str | None, typer.Argument(help="'show' to print one.")] = None,
            name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None) -> None:
    """List the packaged recipes, or show one with all its defaults."""
    if action is None:
        for each in recipe_names():
            out.print(f"{each}: {Recipe.load(each).description}", soft_wrap=True, highlight=False)
    elif action == "show" and name:
        print(Recipe.load(name).to_yaml(), end="")
    else:
        raise RequestError("write 'quantize-model recipes' or 'quantize-model recipes show NAME'.")


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run, "detect": detect, "plan": plan, "sensitivity": sensitivity, "advise": advise, "diff": diff,
    "eval": evaluate, "diagnose": diagnose, "cut-heads": cut, "report": report, "doctor": doctor, "recipes": recipes}
"""In the order in which the help shows them."""


def _command(name: str, work: Callable[..., None]) -> None:
    """Make a function a command."""
    @functools.wraps(work)
    def interruptible(*args: object, **options: object) -> None:
        try:
            work(*args, **options)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    app.command(name)(interruptible)


for _name, _work in COMMANDS.items():
    _command(_name, _work)


def _with_notes(message: str, error: BaseException) -> str:
    """An error with what is left of the work, where that is known."""
    return "; ".join([message.removesuffix(".") if (notes := getattr(error, "__notes__", [])) else message, *notes])


def _fail(message: str, code: int) -> int:
    err.print(f"quantize-model: {message}", markup=False, highlight=False, soft_wrap=True)
    return code
