"""How one linear is stored, which decides its bytes and who can load it: `WeightFormat`; and the number formats that
its inputs may be rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

InputFormat = Literal["16-bit", "int8", "fp8", "int6", "int4"]
InputScale = Literal["token", "tensor"]
DEPLOYED = frozenset({"int8", "fp8"})
"""Formats of inputs that checkpoints can ask engines for; narrower ones are simulated when sinkquant evaluates."""
INPUT_BITS: dict[str, int] = {"16-bit": 16, "int8": 8, "fp8": 8, "int6": 6, "int4": 4}
Storage = Literal["pack-quantized", "nf4", "nf4-double", "fp4", "fp4-double", "llm.int8", "quanto", "quanto-float8",
                  "gptq"]
PLAIN: Storage = "pack-quantized"
"""compressed-tensors' integers, the default."""
BACKENDS: dict[str, frozenset[str]] = {
    "compressed-tensors": frozenset({PLAIN}),
    "bitsandbytes": frozenset({"nf4", "nf4-double", "fp4", "fp4-double", "llm.int8"}),
    "quanto": frozenset({"quanto", "quanto-float8"}),
    "gptq": frozenset({"gptq"})}
"""Backend -> the storage of linears that its checkpoints hold."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of one linear are stored.

    `bits` 2..8, or 16 for a linear that is left as it is; `group_size` in input columns, -1 for one scale per
    output channel, null with 16 bits. `kind` "float": 8-bit floating point (float8_e4m3fn). `inputs` is the number
    format that the checkpoint asks an engine to round the linear's inputs to, `input_scale` "token" where an engine
    takes a scale per token as it goes, "tensor" where one scale for all is stored with the weights.
    `storage`: the tensors that the linear becomes, compressed-tensors' or another backend's. `columns` input columns
    and `scalars` single weights stand beside the codes in 16 bits each.
    """

    bits: int
    group_size: int | None
    kind: Literal["int", "float"] = "int"
    inputs: str = "16-bit"
    input_scale: str | None = None
    storage: Storage = PLAIN
    columns: int = 0
    scalars: int = 0

    @property
    def packed(self) -> bool:
        """Whether codes and scales are stored instead of the weight."""
        return self.bits < 16

    @property
    def layout(self) -> str:
        """compressed-tensors' name of the format: codes packed into 32-bit words, or one byte each where an engine
        multiplies them with 8-bit inputs as they stand."""
        if self.kind == "float":
            return "float-quantized"
        bytewise = self.bits == 8 and self.group_size == -1 and self.inputs == "int8"
        return "int-quantized" if bytewise else "pack-quantized"

    @property
    def static_inputs(self) -> bool:
        """Whether a scale of the inputs is stored."""
        return self.packed and self.inputs != "16-bit" and self.input_scale == "tensor"

    @property
    def split(self) -> bool:
        """Whether a part of the weight stands beside the codes, which takes sinkquant to load."""
        return self.packed and self.columns + self.scalars > 0


def backend_of(storages: set[str]) -> str:
    """The backend whose checkpoints hold these storages; compressed-tensors where there are none."""
    return next((name for name, held in BACKENDS.items() if storages and storages <= held), "compressed-tensors")
