"""The one name matcher: globs, or regular expressions after "re:", against module names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence

from sinkquant.errors import RequestError


def match(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """The names that a pattern matches, in order.

    Args:
        pattern: a glob over the whole name ("*.down_proj"), or "re:" and a regular expression that is searched for.
        key: the recipe key that the pattern stands in, for the error.

    Raises:
        RequestError: the pattern matches nothing, or is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise RequestError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error
        found = [name for name in names if expression.search(name)]
    else:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise RequestError(f"{key}: the pattern {pattern!r} matches no module{_near_miss(pattern, names)}.")
    return found


def _near_miss(pattern: str, names: Sequence[str]) -> str:
    """Compare leaf with leaf, since that is where names are mistyped."""
    leaf = re.split(r"[.*]", pattern.removeprefix("re:").rstrip("$*"))[-1].strip("\\^")
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5) or difflib.get_close_matches(
        pattern, list(names), n=1, cutoff=0.3)
    return f", did you mean {close[0]!r}" if close else ""
