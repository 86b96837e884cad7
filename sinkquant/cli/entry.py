"""quantize-model: the command line."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import io
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from sinkquant.cli.compared import compare, explain
from sinkquant.cli.init import init
from sinkquant.cli.models import cut, detect, diagnose, doctor, imatrix
from sinkquant.cli.paper import err, out, paragraph
from sinkquant.cli.parts import QuietOption
from sinkquant.cli.plans import advise, diff, plan, sensitivity
from sinkquant.cli.results import evaluate, report
from sinkquant.cli.runs import run
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.recipe import Recipe, recipe_names

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 the request is wrong, 3 done but below the recipe's quality gate."
app = typer.Typer( pretty_exceptions_enable=False, epilog=EXIT_CODES)
# typer carries its own copy of click or uses the installed one, by version; this names the right class in both.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Interrupted(Exception):
    """Ctrl-C, which typer would make an exit code of; with what the command says of what is left."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong request, 3 below the quality gate."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores Ctrl-C for its background jobs
        signal.signal(number, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # tokens that the terminal's encoding lacks
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
        code = _fail(_with_notes(f"unexpected {type(error).__name__}: {reason[:300]} (run quantize-model --traceback "
                                 "... for all of it).", error), 1)
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


def recipes(action: Annotated[str | None, typer.Argument(help="'show' to print one.")] = None,
            name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None) -> None:
    """List the packaged recipes, or show one with all its defaults."""
    if action is None:
        for each in recipe_names():
            paragraph(f"{each}: {Recipe.load(each).description}")
    elif action == "show" and name:
        print(Recipe.load(name).to_yaml(), end="")
    else:
        raise RequestError("write 'quantize-model recipes' or 'quantize-model recipes show NAME'.")


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run, "detect": detect, "plan": plan, "sensitivity": sensitivity, "advise": advise, "diff": diff,
    "eval": evaluate, "compare": compare, "explain": explain, "diagnose": diagnose, "cut-heads": cut,
    "imatrix": imatrix, "report": report, "doctor": doctor, "recipes": recipes, "init": init}
"""In the order in which the help shows them."""


def _command(name: str, work: Callable[..., None]) -> None:
    """Make a function a command, with what all commands can do."""
    @functools.wraps(work)
    def command(*args: object, quiet: bool, **options: object) -> None:
        out.quiet = quiet
        try:
            work(*args, **options)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    quietly = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption)
    parameters = [*inspect.signature(work, eval_str=True).parameters.values(), quietly]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command(name, epilog=EXIT_CODES)(command)


for _name, _work in COMMANDS.items():
    _command(_name, _work)


def _with_notes(message: str, error: BaseException) -> str:
    """An error with what is left of the work, where that is known."""
    return "; ".join([message.removesuffix(".") if (notes := getattr(error, "__notes__", [])) else message, *notes])


def _fail(message: str, code: int) -> int:
    err.print(f"quantize-model: {message}", markup=False, highlight=False, soft_wrap=True)
    return code
