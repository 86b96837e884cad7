"""The number formats that the inputs of a linear may be rounded to while a model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class InputFormat:
    """One format of inputs.

    `kind` is that of its codes, and of the weights that they are multiplied with. `deployed`: a checkpoint can ask
    engines for it; where not, sinkquant simulates it when it evaluates. `scales`: what a scale may be of: "token" and
    "group" come as the inputs come, "tensor" is stored. `group_size`: inputs that have a scale together, of formats
    with a scale per group; `scale_dtype`: what such a scale is; `over_groups`: the scales of groups stand under one of
    the whole tensor, which is stored.
    """

    name: str
    bits: int
    kind: Literal["int", "float"] = "int"
    deployed: bool = True
    scales: tuple[str, ...] = ("token", "tensor")
    group_size: int | None = None
    scale_dtype: str | None = None
    over_groups: bool = False

    def stored(self, scale: str | None) -> bool:
        """Whether inputs with scales of that have one that calibration finds and the checkpoint stores."""
        return scale == "tensor" or (scale == "group" and self.over_groups)

    @property
    def even(self) -> bool:
        """Whether codes are evenly spaced, so that small inputs under a large scale are rounded to nothing. Floats are
        precise relative to each input."""
        return self.kind == "int"

    def arguments(self, scale: str) -> dict[str, object]:
        """compressed-tensors' `QuantizationArgs` of such inputs, with scales of that."""
        found: dict[str, object] = {"num_bits": self.bits, "type": self.kind, "symmetric": True,
                                    "dynamic": scale != "tensor", "strategy": scale, "group_size": None}
        if scale == "group":
            found |= {"group_size": self.group_size, "scale_dtype": self.scale_dtype, "zp_dtype": self.scale_dtype}
        return found | {"strategy": "tensor_group", "dynamic": "local"} if self.over_groups else found


NO_ROUNDING = "16-bit"
INPUTS = (InputFormat(NO_ROUNDING, 16, deployed=False), InputFormat("int8", 8), InputFormat("fp8", 8, "float"),
          InputFormat("int6", 6, deployed=False), InputFormat("int4", 4, deployed=False),
          InputFormat("nvfp4", 4, "float", scales=("group",), group_size=16, scale_dtype="torch.float8_e4m3fn",
                      over_groups=True),
          InputFormat("mxfp4", 4, "float", scales=("group",), group_size=32, scale_dtype="torch.uint8"),
          InputFormat("mxfp8", 8, "float", scales=("group",), group_size=32, scale_dtype="torch.uint8"))
"""All of them; the first one is no rounding at all."""


def input_format(name: str) -> InputFormat:
    """The format of a name.

    Raises:
        ValueError: there is none.
    """
    for one in INPUTS:
        if one.name == name:
            return one
    raise ValueError(f"inputs are rounded to one of {', '.join(one.name for one in INPUTS)}, not {name!r}")


def in_blocks(settings: Mapping[str, Any]) -> bool:
    """Whether what compressed-tensors says of inputs (its QuantizationArgs as JSON) is one of the formats in blocks."""
    asked = tuple(settings.get(key) for key in ("type", "num_bits", "group_size"))
    return any(form.group_size is not None and asked == (form.kind, form.bits, form.group_size)
               for form in INPUTS)


def of_e2m1(kind: str, bits: int) -> bool:
    """Whether codes of a kind, as compressed-tensors names it, are E2M1."""
    return (kind, bits) == ("float", 4)


def deployed(name: str) -> bool:
    """Whether a checkpoint can ask engines for inputs in this format."""
    return input_format(name).deployed


def known_inputs(name: str) -> str:
    """The name, for pydantic.

    Raises:
        ValueError: there is no such format.
    """
    return input_format(name).name
