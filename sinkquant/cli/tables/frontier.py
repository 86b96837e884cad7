"""A sweep of budgets as a table."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import Frontier
from sinkquant.report.frontier import COLUMNS, rows


def frontier_table(found: Frontier) -> Table:
    """A line for every plan."""
    shown = Table(COLUMNS[0], title=f"{found.model}: predicted loss against bytes", title_justify="left")
    for name in COLUMNS[1:]:
        shown.add_column(name, justify="right")
    for row in rows(found):
        shown.add_row(*map(escape, row))
    return shown
