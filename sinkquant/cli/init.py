"""The command that asks a few questions and writes a recipe."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
import yaml

from sinkquant.artifacts.base import write_atomically
from sinkquant.cli.paper import paragraph
from sinkquant.errors import RequestError
from sinkquant.models import resolve
from sinkquant.recipe import Recipe

Engine = Literal["transformers", "vllm-cuda", "vllm-cpu", "sinkquant"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def init(output: Annotated[Path, typer.Argument(help="The recipe file to write; must not exist yet.")] = Path(
             "recipe.yaml"),
         model: Annotated[str | None, typer.Option("-m", "--model", help="A model folder, a GGUF file, a hub id, or "
                                                                         "'demo'; asked for where left out.")] = None,
         engine: Annotated[str | None, typer.Option(help=f"What will load it: {', '.join(get_args(Engine))}; asked for "
                                                         "where left out.")] = None,
         size: Annotated[str | None, typer.Option(help="Bits per weight (4, 3.5) or the size of the checkpoint (80MB, "
                                                       "1.5GB); asked for where left out.")] = None) -> None:
    """Ask for model, engine and target size, and write a commented recipe."""
    if output.exists():
        raise RequestError(f"{output} exists already; name another file, or remove it.")
    model = model or typer.prompt("Model (folder, GGUF file, hub id, or demo)", default="demo")
    resolve(model)
    engine = engine or typer.prompt(f"Engine ({', '.join(get_args(Engine))})", default="transformers")
    if engine not in get_args(Engine):
        raise RequestError(f"no engine {engine!r}; choose from {', '.join(get_args(Engine))}.")
    content = recipe_text(output.stem, engine, size or typer.prompt("Bits per weight (4, 3.5) or size (80MB, 1.5GB)",
                                                                    default="4"))
    Recipe.parse(yaml.safe_load(content), "the answers")
    write_atomically(output, content)
    paragraph(f"Recipe: {output}")
    named, written = shlex.quote(model), shlex.quote(str(output))
    paragraph(f"Next: quantize-model plan {named} -r {written}, then quantize-model run {written} --model {named}")


def recipe_text(name: str, engine: str, size: str) -> str:
    """A recipe as YAML, with what each key means.

    Args:
        size: bits per weight as a number, or bytes with a unit of `UNITS`.

    Raises:
        RequestError: the size is neither.
    """
    bits, budget = 4, ""
    if found := re.fullmatch(r"([0-9.]+)\s*([KMGT]B)", size.strip(), re.IGNORECASE):
        budget = f"  bytes: {round(_number(found[1], size) * UNITS[found[2].upper()])}  # of the whole checkpoint\n"
    elif not (number := _number(size, size)).is_integer():
        if not 2 < number < 16:
            raise RequestError(f"{size} bits per weight cannot be had; ask for more than 2 and fewer than 16.")
        budget = f"  bits: {number:g}  # per weight on average, scales counted\n"
    elif 2 <= number <= 8:
        bits = int(number)
    else:
        raise RequestError(f"{size} bits per weight cannot be had; ask for 2 to 8, or a size such as 80MB.")
    lines = [
        "# Written by quantize-model init. Every other key has its default (quantize-model recipes show w4a16-sink).",
        f"name: {json.dumps(name, ensure_ascii=False)}",
        "calibration:",
        "  text: null  # your own text fits your use better than the packaged prose",
        "  rows: 64  # of 512 tokens",
        "weights:",
        "  method: gptq  # rtn is fast and needs no text; gptq loses less",
        f"  bits: {bits}",
        "  group_size: 64  # weights that share a scale; smaller is more exact and larger on disk",
        "protect:",
        "  sink_weight: 16  # times that sink tokens count in the statistics, at most; costs no bytes"]
    if budget:
        lines += ["budget:", budget.rstrip("\n"), f"  engine: {engine}  # only formats that it loads",
                  "  solver: sensitivity  # bits go where the predicted loss falls most"]
    else:
        lines.append(f"# For {engine}: quantize-model plan says under \"loads in\" whether it loads this.")
    return "\n".join(lines) + "\n"


def _number(text: str, size: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"{size!r} is no size; write bits per weight (4, 3.5) or bytes (80MB, 1.5GB).") from error
