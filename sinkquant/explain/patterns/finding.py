"""The contract of a pattern: a matrix before and after -> what may be wrong, and the matrix with that put right."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sinkquant.artifacts.explanation import CauseKind


@dataclass(frozen=True)
class Evidence:
    """What patterns are looked for in.

    Attributes:
        module: its name. before, after: float [rows, columns].
        shares: first-order part of every weight in the loss, [rows, columns].
        heads: width of a head where the rows are queries or keys behind a rotary embedding, else 0.
        frequencies: [width / 2], radians a position turns every pair of such a head by; empty without.
        sink_columns: input columns that the sinks set.
    """

    module: str
    before: torch.Tensor
    after: torch.Tensor
    shares: torch.Tensor
    heads: int = 0
    frequencies: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sink_columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """`mended`: [rows, columns], as the checkpoint has it but for what is put right. `what` goes on after "In MODULE,";
    `done` names the counterfactual."""

    kind: CauseKind
    what: str
    done: str
    mended: torch.Tensor
