"""A comparison as a table for a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts.comparison import Comparison
from sinkquant.report.compared import cells, columns


def comparison_table(found: Comparison) -> Table:
    """A line for every model that was measured; columns that say nothing are left out."""
    names, lines = columns(found), cells(found)
    kept = [place for place, name in enumerate(names)
            if any(line[place] for line in lines) and not (name == "KV bits" and all(x[place] == "16" for x in lines))]
    shown = Table(*(escape(names[place]) for place in kept), title="Comparison", title_justify="left")
    for line in lines:
        shown.add_row(*(escape(line[place]) for place in kept))
    return shown
