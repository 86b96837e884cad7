"""JSON objects of model folders and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sinkquant.errors import RequestError, first_line


def read_object(path: Path, advice: str, unreadable: str | None = None) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        advice: what to do where there is none, as the end of a sentence. unreadable: what is said in its place, with
            what joins it to the sentence, where the file cannot be read at all.

    Raises:
        RequestError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read ({first_line(error)}){unreadable or f'; {advice}'}.") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} is no JSON object; {advice}.")
    return content
