"""What every detector may see of one set of rows: who receives attention, and how large the residual stream is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sinkquant.detect.residual import ResidualStream
from sinkquant.detect.table import AttentionTable


@dataclass(frozen=True, eq=False)
class Survey:
    """What one set of rows showed. Of a `control` only the attention is seen.

    Attributes:
        rows: int64 [rows, length].
        recorded: whether the inputs of linears are recorded of this set.
    """

    rows: torch.Tensor
    control: bool = False
    recorded: bool = False
    table: AttentionTable = field(default_factory=AttentionTable)
    stream: ResidualStream = field(default_factory=ResidualStream)
