"""What detection keeps of a model's shape, so that a plan from its sink map need not build the model again."""

from __future__ import annotations

from pydantic import Field

from sinkquant.artifacts.base import Strict
from sinkquant.artifacts.shapes import LinearShape, ModelShape


class LayerExperts(Strict):
    """The projections of one layer's experts. `parts`: name with `*` for the expert's number -> the shape that all
    experts have, in the order of one expert."""

    count: int
    parts: dict[str, LinearShape]


class KeptShape(Strict):
    """A model's shape and the files that it is the shape of.

    `files`: a hash of the configuration and of the headers of all weights, of what reads them, and of the other two.
    `shape` is without name, folder and experts; `experts` has one entry per layer that has some.
    """

    files: str
    shape: ModelShape
    experts: list[LayerExperts] = Field(default_factory=list)

    @classmethod
    def of(cls, shape: ModelShape, files: str) -> KeptShape | None:
        """Keep a shape; None for one that would not come back as it is."""
        layers: dict[int, dict[str, LinearShape]] = {}
        counts: dict[int, int] = {}
        for name, linear in shape.linears.items():
            if linear.part_of is not None:
                number, pattern = _numbered(name)
                layers.setdefault(linear.block, {}).setdefault(pattern, linear.model_copy(update={"fused_with": []}))
                counts[linear.block] = number + 1
        rest = {name: linear for name, linear in shape.linears.items() if linear.part_of is None}
        found = cls(files=files, shape=shape.model_copy(update={"name": "", "folder": None, "linears": rest}),
                    experts=[LayerExperts(count=counts[block], parts=parts) for block, parts in layers.items()])
        return found if _listed(found.restored(shape.name, shape.folder)) == _listed(shape) else None

    def restored(self, name: str, folder: str | None) -> ModelShape:
        """The shape that was kept, of a model with this name in this folder."""
        parts = {pattern.replace("*", str(number)): linear for layer in self.experts for number in range(layer.count)
                 for pattern, linear in layer.parts.items()}
        together = list(parts)
        parts = {one: linear.model_copy(update={"fused_with": together}) for one, linear in parts.items()}
        return self.shape.model_copy(update={"name": name, "folder": folder, "linears": self.shape.linears | parts})


def _listed(shape: ModelShape) -> tuple[list[tuple[str, LinearShape]], list[list[str]]]:
    """Linears in their order, and with which others experts are fused: thousands share one list, compared once."""
    lists = {id(linear.fused_with): linear.fused_with for linear in shape.linears.values() if linear.part_of}
    return [(name, linear.model_copy(update={"fused_with": []}) if linear.part_of else linear)
            for name, linear in shape.linears.items()], list(lists.values())


def _numbered(name: str) -> tuple[int, str]:
    """The number of an expert in the name of its projection, and the name with `*` in its place."""
    places = name.split(".")
    last = max(place for place, part in enumerate(places) if part.isdigit())
    return int(places[last]), ".".join([*places[:last], "*", *places[last + 1:]])
