"""The model card of a checkpoint, as model hubs show it."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD = "README.md"


def hub_id(model: str) -> str | None:
    """The id on a hub that a model was named by, or None: a folder's path means nothing to others."""
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None
