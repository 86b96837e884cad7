"""Which files a result can be written as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sinkquant.errors import RequestError


def require_kind(path: Path, kinds: Sequence[str]) -> None:
    """Refuse a file of a kind that is not written. kinds: two or more endings, each with its dot."""
    if path.suffix not in kinds:
        raise RequestError(f"{path} is none of the files that are written; end it in {', '.join(kinds[:-1])} or "
                           f"{kinds[-1]}.")
