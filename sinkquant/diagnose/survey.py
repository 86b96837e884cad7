"""One walk over rows of text with everything watching that diagnostics and fidelity need.

Bounded: a few numbers per layer, head and token; never a length x length matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sinkquant.detect.residual import ResidualStream
from sinkquant.detect.table import AttentionTable
from sinkquant.models import AttentionRecord, AttentionRows, Decoder, Step, Walk

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class WalkSettings:
    """Where and in which dtype the walk computes, and the seed of everything that is drawn."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def walk(self, decoder: Decoder, rows: torch.Tensor, observers: list[AttentionTable] | None = None) -> Walk:
        """A walk over rows, as many at a time as make up `TOKENS_PER_BATCH`."""
        batch = max(1, TOKENS_PER_BATCH // rows.shape[1])
        return Walk(decoder, rows, batch, self.device, self.dtype, observers or [])


class QueryTable(AttentionTable):
    """What every query does with its attention, beside what every position receives.

    Attributes (lists over layers, on the CPU):
        sink_mass: [rows, heads, length] float32, mass on the sinks and on the learned sink column.
        target: [rows, heads, length] int64, the position other than a sink that gets the most.
        entropy: [rows, heads] float64, mean over queries of the entropy of their row over that of even attention.
        head_outputs: [rows, heads] float64, mean norm of the head's output.
    """

    def __init__(self, sinks: torch.Tensor) -> None:
        super().__init__()
        self.sinks = sinks
        self.step: Step | None = None
        self.sink_mass: list[torch.Tensor] = []
        self.target: list[torch.Tensor] = []
        self.entropy: list[torch.Tensor] = []
        self.head_outputs: list[torch.Tensor] = []
        self._chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def attention_rows(self, rows: AttentionRows) -> None:
        """Reduce a chunk of queries to three numbers per query."""
        assert self.step is not None
        p = rows.probabilities
        sinks = self.sinks[self.step.batch].to(p.device)[:, None, None, :]
        mass = (p * sinks).sum(-1) + (1 - p.sum(-1)).clamp(min=0)
        target = p.masked_fill(sinks, -1).argmax(-1)
        even = rows.allowed.sum(-1).clamp(min=1).float().log()
        entropy = torch.special.entr(p).sum(-1) / even.clamp(min=1e-12)
        # A query that sees but itself has no choice: it counts for nothing.
        self._chunks.append((mass, target, torch.where(even > 0, entropy, torch.nan)))

    def attention(self, record: AttentionRecord) -> None:
        """The end of a batch: its chunks are put together."""
        super().attention(record)
        mass, target, entropy = (torch.cat(parts, dim=-1) for parts in zip(*self._chunks, strict=True))
        self._chunks = []
        norms = record.output.float().norm(dim=-1).double().mean(-1)
        self._batches.append((mass.cpu(), target.cpu(), entropy.double().nanmean(-1).cpu(), norms.cpu()))

    def close_layer(self, rows: torch.Tensor) -> None:
        """All batches of a layer were seen."""
        super().close_layer(rows)
        if not self._batches:
            nobody = torch.zeros(len(rows), 0, rows.shape[1])
            self._batches = [(nobody, nobody.long(), nobody[..., 0].double(), nobody[..., 0].double())]
        for kept, parts in zip((self.sink_mass, self.target, self.entropy, self.head_outputs),
                               zip(*self._batches, strict=True), strict=True):
            kept.append(torch.cat(parts))
        self._batches = []


@dataclass
class RowSurvey:
    """What one set of rows showed. Lists over layers; figures per row are float64 [rows].

    Attributes:
        rows, sinks: int64 and bool [rows, length].
        ended: what the last block gave, [rows, length, hidden_size].
    """

    rows: torch.Tensor
    sinks: torch.Tensor
    table: QueryTable
    stream: ResidualStream
    mu: list[torch.Tensor] = field(default_factory=list)
    mu_ratio: list[torch.Tensor] = field(default_factory=list)
    mu_ratio_without_sinks: list[torch.Tensor] = field(default_factory=list)
    effective_rank: list[torch.Tensor] = field(default_factory=list)
    effective_rank_without_sinks: list[torch.Tensor] = field(default_factory=list)
    ended: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def head_mass(self) -> list[torch.Tensor]:
        """Mean attention on the sinks by layer, float64 [heads, rows], by the queries that come after a row's first
        sink. 0 in rows that hold none."""
        place = torch.arange(self.rows.shape[1])
        first = torch.where(self.sinks.any(1), self.sinks.float().argmax(1), torch.tensor(self.rows.shape[1]))
        after = (place[None] > first[:, None]).double()[:, None]
        return [((mass.double() * after).sum(-1) / after.sum(-1).clamp(min=1)).T for mass in self.table.sink_mass]


def survey(decoder: Decoder, rows: torch.Tensor, sinks: torch.Tensor, compute: WalkSettings,
           ranks: bool = True) -> RowSurvey:
    """Walk over rows.

    Args:
        rows: int64 [rows, length]; sinks: bool [rows, length].
        ranks: also rank collapse and effective rank, which take a singular value decomposition per row and layer.
    """
    table = QueryTable(sinks)
    found = RowSurvey(rows, sinks, table, ResidualStream())
    walk = compute.walk(decoder, rows, [table])
    for step in walk.steps():
        table.step = step
        found.stream.run(step)
        table.close_layer(rows)
        if ranks:
            assert step.outputs is not None
            _ranks(found, step.outputs)
    found.ended = walk.hidden
    return found


def rank_collapse(hidden: torch.Tensor) -> tuple[float, float]:
    """mu(V) = ||V - (1/n) 1 1^T V||_F and mu(V) / ||V||_F. `hidden`: [n, hidden_size]."""
    hidden = hidden.double()
    mu = float((hidden - hidden.mean(0)).norm())
    return mu, mu / max(float(hidden.norm()), 1e-300)


def effective_rank(hidden: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007). `hidden`: [n, hidden_size]."""
    values = torch.linalg.svdvals(hidden.double())
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())


def _ranks(found: RowSurvey, outputs: torch.Tensor) -> None:
    columns: list[list[float]] = [[], [], [], [], []]
    for hidden, sinks in zip(outputs, found.sinks, strict=True):
        rest = hidden[~sinks.to(hidden.device)]
        figures = (*rank_collapse(hidden), rank_collapse(rest)[1], effective_rank(hidden), effective_rank(rest))
        for column, figure in zip(columns, figures, strict=True):
            column.append(figure)
    for kept, column in zip((found.mu, found.mu_ratio, found.mu_ratio_without_sinks, found.effective_rank,
                             found.effective_rank_without_sinks), columns, strict=True):
        kept.append(torch.tensor(column, dtype=torch.float64))
