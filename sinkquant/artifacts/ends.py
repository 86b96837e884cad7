"""How a checkpoint holds the token embedding and the output head, where not in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator

from sinkquant.artifacts.base import Strict
from sinkquant.artifacts.shapes import ModelShape
from sinkquant.schemes import PLAIN, WeightFormat, scheme_of
from sinkquant.schemes.registry import known_storage
from sinkquant.schemes.tensors import Tensor, total_bytes

WEIGHT = "weight"


class EndDecision(Strict):
    """How one of the two is stored. `group_size` in columns, -1 for one scale per row, that is per token. `shares`: the
    embedding whose codes a tied head reads, with scales under its own name; null where it has codes of its own.
    `bytes`: of its tensors, without the codes that it shares."""

    bits: Literal[2, 3, 4, 5, 6, 7, 8]
    group_size: int
    storage: Annotated[str, AfterValidator(known_storage)] = PLAIN
    shares: str | None = None
    bytes: int
    reason: str

    @property
    def form(self) -> WeightFormat:
        """How the weights are stored."""
        return WeightFormat(self.bits, self.group_size, storage=self.storage)


def end_tensors(shape: ModelShape, name: str, form: WeightFormat, shares: str | None) -> dict[str, Tensor]:
    """The tensors that the embedding or the head becomes, by their names in a checkpoint."""
    end = shape.ends[name]
    leaves = scheme_of(form).tensors(end.rows, end.columns, form, shape.dtype, False)
    return {f"{name}.{leaf}": tensor for leaf, tensor in (leaves | end.buffers).items()
            if not (shares and leaf == WEIGHT)}


def end_bytes(shape: ModelShape, name: str, form: WeightFormat, shares: str | None) -> int:
    """Bytes of these tensors."""
    return total_bytes(end_tensors(shape, name, form, shares).values())


def with_ends(shape: ModelShape, ends: Mapping[str, EndDecision]) -> ModelShape:
    """The shape with the tensors that a checkpoint has for both; a head that is no longer tied has its own."""
    if not ends:
        return shape
    tensors: dict[str, Tensor] = {}
    made = {name: end_tensors(shape, name, end.form, end.shares) for name, end in ends.items()}
    for key, tensor in shape.tensors.items():
        name = key.removesuffix(".weight")
        tensors |= made.pop(name) if name in made and key != name else {key: tensor}
    for more in made.values():
        tensors |= more
    return shape.model_copy(update={"tensors": tensors})
