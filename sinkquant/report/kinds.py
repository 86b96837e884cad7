"""Which files a result can be written as, and how a table of one is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sinkquant.errors import RequestError


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table; bars inside its cells are text."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def require_kind(path: Path, kinds: Sequence[str]) -> None:
    """Refuse a file of a kind that is not written. kinds: endings, each with its dot."""
    if path.suffix not in kinds:
        ends = " or ".join(part for part in (", ".join(kinds[:-1]), kinds[-1]) if part)
        raise RequestError(f"{path} is none of the files that are written; end it in {ends}.")
