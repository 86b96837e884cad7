"""What the experts of a model must share for plain transformers to load them, and their token counts in words.

transformers (5.23) reads all packed experts of a checkpoint by one scheme, and stacks a layer's experts from tensors
that are either all packed or all dense.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from sinkquant.artifacts.shapes import ModelShape
from sinkquant.artifacts.sinkmap import SinkMap
from sinkquant.errors import RequestError
from sinkquant.schemes import WeightFormat, scheme_of

TUNE_AND_EXPERTS = ("weights.tune does not reach packed experts; set weights.tune=0, or leave the experts in 16 bits "
                    "with weights.ignore=['*.experts.*'].")

SHOWN, SINKS_SHOWN = 32, 8
"""So many token counts, and experts that sinks go to, are listed one by one."""


def mixed_experts(shape: ModelShape, formats: Mapping[str, WeightFormat]) -> tuple[str, str] | None:
    """Two experts whose formats cannot stand in one checkpoint, or None.

    Args:
        formats: name -> format of every linear of the model.
    """
    one: str | None = None
    in_block: dict[int, str] = {}
    for name, linear in shape.linears.items():
        if not linear.part_of:
            continue
        first = in_block.setdefault(linear.block, name)
        if formats[first].packed != formats[name].packed:
            return first, name
        if formats[name].packed:
            one = one or name
            if formats[one] != formats[name]:
                return one, name
    return None


def require_loadable(shape: ModelShape, formats: Mapping[str, WeightFormat], own: bool) -> None:
    """Refuse a checkpoint that plain transformers would load into other experts than the model's own.

    Args:
        formats: name -> format of every packed linear. own: whether it is in sinkquant's own format, which is loaded
            into the model's own.
    """
    for backend in () if own else dict.fromkeys(scheme_of(form).backend for form in formats.values()):
        if backend in shape.not_loaded_from:
            raise RequestError(f"{shape.architecture} cannot be packed in the format of {backend}: transformers loads "
                               "such a checkpoint into experts with other tensors than the model has; use the backend "
                               "gptq or quanto.")


def in_short(counts: Sequence[int]) -> str:
    """The spread of the experts' token counts, or all of them where they are few."""
    if len(counts) <= SHOWN:
        return " ".join(map(str, counts))
    return f"{min(counts)} to {max(counts)}, {statistics.median(counts):g} in the median of {len(counts)}"


def in_lines(sink_map: SinkMap) -> list[str]:
    """One line for every layer of experts: the tokens of each, and which of them the sinks go to."""
    lines = []
    for owner, found in sink_map.experts.items():
        to = [f"{index} ({count} of {found.tokens[index]})" for index, count in enumerate(found.sink_tokens) if count]
        sinks = ", ".join(to[:SINKS_SHOWN]) + (f" and {len(to) - SINKS_SHOWN} more" if len(to) > SINKS_SHOWN else "")
        lines.append(f"{owner}: tokens per expert {in_short(found.tokens)}; sinks go to {sinks or 'none'}")
    return lines


def few_tokens(tokens: Mapping[str, Sequence[int]], least: int) -> str:
    """The experts that fewer than `least` tokens went to, each with its count; empty where there is none.

    Args:
        tokens: module name of a layer's experts -> tokens per expert.
    """
    named = []
    for owner, counts in tokens.items():
        few = [f"{index} ({count})" for index, count in enumerate(counts) if count < least]
        if few:
            named.append(f"{owner} {', '.join(few)}")
    return "; ".join(named)
