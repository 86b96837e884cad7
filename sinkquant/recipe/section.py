"""What the sections of a recipe have in common."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _stored_bits(bits: int) -> int:
    if bits > 8 and bits != 16:
        raise ValueError("weights take 2 to 8 bits, or 16 to be left alone")
    return bits


def _fits_a_group(size: int) -> int:
    if size == 0:
        raise ValueError("a group holds at least one column; -1 makes one group of the whole row")
    return size


Bits = Annotated[int, AfterValidator(_stored_bits)]
GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_fits_a_group)]
Statistics = Literal["all", "boost", "attention", "cap", "exclude"]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""What `--set` takes as it stands, not as YAML; `~` is the home folder."""
