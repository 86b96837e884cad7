"""What commands print on: paragraphs and tables, in which no name of a module is cut."""

from __future__ import annotations

import os
import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

out, err = Console(), Console(stderr=True)
INDENT = 2


def paragraph(text: str, depth: int = 0) -> None:
    """Print a text, wrapped between words for a terminal; the lines after the first stand further in."""
    width = out.width if out.is_terminal or "COLUMNS" in os.environ else len(text) + INDENT * depth + 1
    margin = " " * INDENT * depth
    lines = textwrap.wrap(text, max(width, 40), initial_indent=margin, subsequent_indent=f"{margin}  ",
                          break_long_words=False, break_on_hyphens=False)
    for line in lines:
        out.print(Text(line), soft_wrap=True, highlight=False)


def table(shown: Table) -> None:
    """Print a table as wide as its longest words need it, however narrow the terminal is."""
    for column in shown.columns:
        column.min_width = max(out.measure(cell).minimum for cell in [column.header, *column.cells])
    out.print(shown, width=max(out.width, out.measure(shown).minimum), crop=False)
