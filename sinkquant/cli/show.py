"""Artifacts on the terminal."""

from __future__ import annotations

from pathlib import Path

from sinkquant.artifacts import Frontier, Plan, Report, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.cli.paper import paragraph, table
from sinkquant.cli.parts import printed
from sinkquant.cli.tables import sinkmap
from sinkquant.cli.tables.plan import plan_lines
from sinkquant.cli.tables.report import result_table, sentences


def show_sink_map(found: SinkMap, full: bool = False) -> None:
    """What was detected, the strongest of each kind; all of it with `full`."""
    for line in sinkmap.facts(found):
        paragraph(line)
    if (shown := sinkmap.token_table(found, full)) is not None:
        table(shown)
    for line in [*sinkmap.findings(found, full), sinkmap.meaning(found)]:
        paragraph(line)


def show_plan(made: Plan, full: bool = False) -> None:
    """Groups of linears with the same decision, then bytes, predictions and notes; every linear with `full`."""
    for depth, line in plan_lines(made, full):
        paragraph(line, depth)


def show_frontier(found: Frontier, output: Path | None, json: bool) -> None:
    """A sweep of budgets; also as a page and as JSON beside it where `output` is named."""
    from sinkquant.cli.tables.measured import frontier_table  # matplotlib
    from sinkquant.report.frontier import page

    whole = output and output.with_suffix("")
    if whole:
        found.save(whole.with_name(f"{whole.name}.json"))
        write_atomically(whole.with_name(f"{whole.name}.html"), page(found))
    if printed(found, json):
        return
    table(frontier_table(found))
    for note in found.notes:
        paragraph(f"Note: {note}")
    if whole:
        paragraph(f"Frontier: {whole.with_name(f'{whole.name}.html')}")


def show_report(made: Report) -> None:
    """Every row's main figures, the verdict and what broke the gate."""
    table(result_table(made))
    for line in sentences(made):
        paragraph(line)
