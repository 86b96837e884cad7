"""Comparisons, explanations and sweeps of budgets on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import Frontier
from sinkquant.artifacts.comparison import Comparison
from sinkquant.artifacts.explanation import Explanation
from sinkquant.report import compared, frontier
from sinkquant.report.explained import Cells, options, shown_tables


def explanation_lines(found: Explanation) -> Iterator[tuple[int, str]]:
    """(depth, line): the loss, the causes with their recipe changes, the sinks, notes."""
    yield 0, found.sentence if not found.causes else found.sentence.partition(found.causes[0].sentence)[0].strip()
    for place, cause in enumerate(found.causes, start=1):
        yield 0, f"{place}. {cause.sentence}"
        if cause.recipe:
            yield 1, f"mend it: {options(cause.recipe)} ({cause.advice})"
        elif cause.advice:
            yield 1, f"mend it: {cause.advice}"
        if cause.verified:
            yield 1, (f"verified: quantized anew with that, KL {cause.verified.kl:.3g}, "
                      f"{100 * cause.verified.removes:.0f} % less")
    for change in found.settings:
        yield 0, f"Other than in the baseline: {change.name}: {change.before} -> {change.after}."
    if found.sinks_sentence:
        yield 0, found.sinks_sentence
    for note in found.notes:
        yield 0, f"Note: {note}."


def explanation_tables(found: Explanation, full: bool) -> Iterator[Table]:
    """Where the loss is: parts of the model, positions, tokens, heads, massive channels."""
    for title, cells in shown_tables(found, full).items():
        yield _table(title, cells)


def comparison_table(found: Comparison) -> Table:
    """A line for every model that was measured; columns that say nothing are left out."""
    names, lines = compared.columns(found), compared.cells(found)
    kept = [place for place, name in enumerate(names)
            if any(line[place] for line in lines) and not (name == "KV bits" and all(x[place] == "16" for x in lines))]
    return _table("Comparison", [[line[place] for place in kept] for line in (names, *lines)])


def frontier_table(found: Frontier) -> Table:
    """A line for every plan."""
    shown = _table(f"{found.model}: predicted loss against bytes", [frontier.COLUMNS, *frontier.rows(found)])
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def _table(title: str, cells: Cells) -> Table:
    shown = Table(*map(escape, cells[0]), title=escape(title), title_justify="left")
    for line in cells[1:]:
        shown.add_row(*map(escape, line))
    return shown
