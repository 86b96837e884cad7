"""Commands that put quantized models beside their original: several at once, and why one of them is worse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkquant.artifacts import SinkMap
from sinkquant.cli.paper import paragraph, table
from sinkquant.cli.parts import (
    FullOption,
    JsonOption,
    SetOption,
    SinkMapOption,
    TextOption,
    TrustOption,
    printed,
    shown_progress,
    task_names,
    to_file,
)
from sinkquant.models import resolve
from sinkquant.models.folder import inside_run
from sinkquant.recipe import Recipe

BaselineOption = Annotated[str, typer.Option("--baseline", help="The unquantized model.")]
CHECKPOINT = "A run's folder, a checkpoint (compressed-tensors, GPTQ, bitsandbytes, quanto) or a GGUF file"


def compare(checkpoints: Annotated[list[str], typer.Argument(help=CHECKPOINT + "; any number of them.")],
            baseline: BaselineOption, text: TextOption = None,
            tasks: Annotated[str | None, typer.Option(help="lm-eval tasks to score all models on, by commas; default: "
                                                           "none.")] = None,
            assignments: SetOption = None, sink_map: SinkMapOption = None,
            sinks: Annotated[bool, typer.Option(help="Whether to measure sink fidelity.")] = True,
            json: JsonOption = False,
            output: Annotated[Path | None, to_file("Write the report here; .html, .md or .json.")] = None,
            trust_remote_code: TrustOption = False) -> None:
    """Any number of checkpoints beside their unquantized model: sizes, divergence, perplexity, sinks, by size."""
    recipe = Recipe.for_comparison().replace(assignments or [])
    known = SinkMap.load(sink_map) if sink_map else None
    resolve(inside_run(baseline))
    from sinkquant.compare import compare as measure
    from sinkquant.report.compared import KINDS, write_comparison
    from sinkquant.report.kinds import require_kind

    if output:
        require_kind(output, KINDS)
    with shown_progress() as progress:
        found = measure(checkpoints, baseline, text=text, tasks=task_names(tasks), recipe=recipe, sink_map=known,
                        sinks=sinks, trust_remote_code=trust_remote_code, progress=progress)
    if output:
        write_comparison(output, found)
    if printed(found, json):
        return
    from sinkquant.cli.tables.measured import comparison_table
    from sinkquant.report.compared import sentence

    table(comparison_table(found))
    paragraph(sentence(found))
    for warning in found.warnings:
        paragraph(f"warning: {warning}.")
    if output:
        paragraph(f"Report: {output}")


def explain(checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT + ".")], baseline: BaselineOption,
            text: TextOption = None,
            rows: Annotated[int, typer.Option(min=1, help="Rows of text that everything is measured on.")] = 8,
            length: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 128,
            assignments: SetOption = None, sink_map: SinkMapOption = None,
            sinks: Annotated[bool, typer.Option(help="Whether to look at the sinks.")] = True,
            verify: Annotated[bool, typer.Option("--verify", help="Quantize the baseline anew with each recipe change "
                                                                  "that is named, and measure it.")] = False,
            full: FullOption = False, json: JsonOption = False,
            output: Annotated[Path | None, to_file("Write the explanation here; .md or .json.")] = None,
            trust_remote_code: TrustOption = False) -> None:
    """Where the loss of a checkpoint comes from: ranked causes, each with what putting it right removes."""
    recipe = Recipe().replace(assignments or [])
    known = SinkMap.load(sink_map) if sink_map else None
    resolve(inside_run(baseline))
    from sinkquant.cli.tables.measured import explanation_lines, explanation_tables
    from sinkquant.explain import explain as find_causes
    from sinkquant.report.explained import KINDS, write_explanation
    from sinkquant.report.kinds import require_kind

    if output:
        require_kind(output, KINDS)
    with shown_progress() as progress:
        found = find_causes(checkpoint, baseline, text=text, rows=rows, length=length, recipe=recipe, sink_map=known,
                            sinks=sinks, verify=verify, trust_remote_code=trust_remote_code, progress=progress)
    if output:
        write_explanation(output, found)
    if printed(found, json):
        return
    for depth, line in explanation_lines(found):
        paragraph(line, depth)
    for shown in explanation_tables(found, full):
        table(shown)
    if output:
        paragraph(f"Explanation: {output}")
