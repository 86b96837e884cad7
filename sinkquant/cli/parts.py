"""What the commands of quantize-model share: options, consoles, bars of progress, and the first steps."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sinkquant.artifacts import Artifact, Sensitivity, SinkMap
from sinkquant.artifacts.base import require_writable
from sinkquant.cli.paper import err, out
from sinkquant.models import resolve
from sinkquant.recipe import Recipe

ModelArgument = Annotated[str, typer.Argument(help="A model folder, a GGUF file, a hub id, or 'demo'.")]
RecipeOption = Annotated[str, typer.Option("-r", "--recipe", help="A recipe file or name.")]
SinkMapOption = Annotated[Path | None, typer.Option(help="A sink map made before; default: detect now.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Set a recipe key.")]
TextOption = Annotated[list[str] | None, typer.Option("--text", help="A file of your own text; may be given again. "
                                                      "Default: packaged prose.")]
FullOption = Annotated[bool, typer.Option("--full", help="Show everything, not one screen.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors and what --json asks for, no more.")]
TaskFolderOption = Annotated[Path | None, typer.Option(help="A folder of lm-eval task files of your own; all of them "
                                                            "are run where evaluate.tasks names none.")]
EngineOption = Annotated[str | None, typer.Option("--engine", help="What is to run the checkpoint: vllm-cuda, "
                                                  "vllm-cpu, llama.cpp, transformers; as --set engine=.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the artifact as JSON.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model folder carries.")]


def to_file(text: str, *names: str) -> Any:
    """The option of a command that writes one file, -o where it has no other name; refused before anything is computed
    where it cannot be written."""
    return typer.Option(*(names or ("-o", "--output")), dir_okay=False, callback=writable, help=text)


def writable(path: Path | None) -> Path | None:
    """The file that an option names.

    Raises:
        RequestError: nothing can be written where it is to be.
    """
    if path is not None:
        path = Path(os.path.expanduser(path))  # pathlib's fails for a name that begins with ~ and is no user
        if path.exists() and not path.is_file() and os.access(path, os.W_OK):
            return path  # a device or a pipe, which is written into
        require_writable(Path(os.path.realpath(path)).parent)
    return path


def kept_or_writable(path: Path | None) -> Path | None:
    """The file that an option names, which is read where it is there."""
    place = path and Path(os.path.expanduser(path))
    return place if place and place.is_file() else writable(path)


SensitivityOption = Annotated[Path | None, typer.Option(
    "--sensitivity", callback=kept_or_writable, help="Take sensitivities from this file, or write them there; a solved "
    "budget needs them, and any plan then predicts its loss.")]


def task_names(given: str | None) -> list[str]:
    """The tasks that an option names by commas."""
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def for_engine(recipe: Recipe, engine: str | None) -> Recipe:
    """The recipe for an engine, where one was named."""
    return recipe.changed(engine=engine) if engine else recipe


def one_text(text: list[str]) -> str | list[str]:
    """The texts of --text as a recipe names them: one alone is no list."""
    return text[0] if len(text) == 1 else text


def for_text(recipe: Recipe, text: list[str] | None) -> Recipe:
    """The recipe with the calibration text of --text, where that is given."""
    return recipe.changed(calibration={"text": one_text(text)}) if text else recipe


def not_unicode() -> bool:
    """Whether what is printed has to be ASCII to be read back."""
    return (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"


def printed(found: Artifact, json: bool, output: Path | None = None) -> bool:
    """Write an artifact to what -o names, print it where --json asks for that, and tell whether it was printed."""
    if output:
        found.save(output)
    if json:
        print(found.to_json(not_unicode()), end="")
    return json


def find_sinks(model: str, text: str | list[str] | None, recipe: Recipe, trust_remote_code: bool,
               quantized: bool = False) -> SinkMap:
    """The sink map of a model, with bars; also of one that is quantized, in any format that is read here."""
    folder = resolve(model)
    from sinkquant.detect import detect as find
    from sinkquant.detect.kept_shape import with_shape
    from sinkquant.models import load_tokenizer, open_model, read_text

    tokenizer = load_tokenizer(folder, trust_remote_code)
    read_text(text or recipe.calibration.text, "calibration", tokenizer)
    with shown_progress() as progress:
        if quantized:
            from sinkquant.formats import open_any

            loaded = open_any(folder, trust_remote_code)
        else:
            loaded = open_model(folder, trust_remote_code)
        return with_shape(find(loaded, tokenizer, text, recipe, model, progress), loaded)


def find_costs(model: str, text: list[str] | None, sink_map: SinkMap, recipe: Recipe, cache: Path | None,
               trust_remote_code: bool) -> Sensitivity:
    """The sensitivities of a model, from a file or made now."""
    from sinkquant.models import ActivationStore, Decoder, load_tokenizer, open_model
    from sinkquant.predict import SENSITIVITIES, require_memory, spill_limit
    from sinkquant.sensitivity import find_sensitivity

    folder = resolve(model)
    asked = for_text(recipe, text)
    loaded = open_model(folder, trust_remote_code)
    if cache is None or not cache.is_file():
        require_memory(Decoder.of(loaded), asked, (SENSITIVITIES,), True)
    store = ActivationStore(Path(tempfile.gettempdir()), spill_limit(asked))
    with shown_progress() as progress:
        return find_sensitivity(loaded, load_tokenizer(folder, trust_remote_code), sink_map, asked, cache, store,
                                progress)


class Bars:
    """One progress bar per label, with the time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, done: int, total: int, label: str) -> None:
        if label not in self.tasks:
            self.tasks[label] = self.progress.add_task(label, total=total)
        self.progress.update(self.tasks[label], completed=done, total=total)


@contextmanager
def shown_progress() -> Iterator[Bars]:
    """Bars on a terminal, silence elsewhere; the libraries' own chatter is turned off."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for library in ("compressed_tensors", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal or out.quiet) as progress:
        yield Bars(progress)
