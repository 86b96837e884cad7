"""How one linear is stored, which decides its bytes and who can load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkquant.schemes.inputs import deployed, input_format

Kind = Literal["int", "float"]
"""Codes are integers, or floating-point numbers of few bits."""
NUMBERS = {"int": "integer", "float": "floating-point"}
"""In words."""
PLAIN = "pack-quantized"
"""The storage of compressed-tensors' own formats, the default."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of one linear are stored.

    `bits` 2..8, or 16 for a linear that is left as it is; `group_size` in input columns, -1 for one scale per
    output channel, null with 16 bits. `kind` "float": codes are floating-point numbers. `inputs` is the number
    format that the checkpoint asks an engine to round the linear's inputs to, `input_scale` "token" where an engine
    takes a scale per token as it goes, "tensor" where one scale for all is stored with the weights, "group" where the
    format gives one to every few inputs.
    `storage` with `kind` names the scheme (`schemes.registry`), which knows the tensors that the linear becomes.
    `columns` input columns and `scalars` single weights stand beside the codes in 16 bits each.
    """

    bits: int
    group_size: int | None
    kind: Kind = "int"
    inputs: str = "16-bit"
    input_scale: str | None = None
    storage: str = PLAIN
    columns: int = 0
    scalars: int = 0

    @property
    def packed(self) -> bool:
        """Whether codes and scales are stored instead of the weight."""
        return self.bits < 16

    @property
    def static_inputs(self) -> bool:
        """Whether a scale of the inputs is stored."""
        return self.packed and self.inputs != "16-bit" and input_format(self.inputs).stored(self.input_scale)

    @property
    def split(self) -> bool:
        """Whether a part of the weight stands beside the codes, which takes sinkquant to load."""
        return self.packed and self.columns + self.scalars > 0

    @property
    def floating(self) -> bool:
        """Whether its codes are floating-point numbers."""
        return self.kind == "float"

    @property
    def numbers(self) -> str:
        """What its codes are, in words."""
        return f"{self.bits}-bit {NUMBERS[self.kind]}"

    def groups(self, columns: int) -> int:
        """Scales per row of a weight with so many input columns."""
        return 1 if self.group_size in (None, -1) else columns // int(self.group_size or columns)


def stored_form(bits: int, group_size: int | None, kind: Kind, activations: str, scale: str | None,
                storage: str = PLAIN, columns: int = 0, scalars: int = 0) -> WeightFormat:
    """How a linear is stored; inputs that are only simulated leave no trace in a checkpoint."""
    if bits == 16 or not deployed(activations):
        activations, scale = "16-bit", None
    return WeightFormat(bits, group_size, kind, activations, scale, PLAIN if bits == 16 else storage, columns, scalars)
