"""The checks of sink fidelity: one figure each of two models, beside the first one's distance from itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from sinkquant.artifacts.fidelity import FidelityCheck
from sinkquant.diagnose.dormant import DORMANT, EARLY, ON
from sinkquant.diagnose.null import halves, level_of, self_distance
from sinkquant.diagnose.survey import RowSurvey

SINK = 0.3
MASSIVE_HALVES = 20
TOLERANCES = {"sink_rate": 0.05, "head_divergence": 0.02, "massive_overlap": 0.2, "massive_ratio": 0.25,
              "value_norm": 0.25, "value_drain": 0.25, "spread": 0.25, "no_op_heads": 0.1, "kl_sinks": 0.05}

Rows = torch.Tensor
"""int64, indices of rows."""
Entries = dict[tuple[int, int, bool], float]
"""(boundary, channel, on a sink) -> largest |h| over the boundary's median."""


@dataclass(frozen=True)
class ProbedModel:
    """One model on the rows.

    Attributes:
        layers: by layer [heads, rows], mean attention on the sinks; mass: the same of all heads, [all heads, rows].
        spread: [rows], mean change of later tokens after the one at `position` is swapped; curve: at every position.
        nulls: check -> distance of the model from itself on other text; filled once, and read for every other model.
    """

    survey: RowSurvey
    layers: list[torch.Tensor]
    mass: torch.Tensor
    position: int
    spread: torch.Tensor
    curve: list[float]
    nulls: dict[str, float] = field(default_factory=dict)

    def null(self, name: str, seed: int, distance: Callable[[Rows, Rows], float]) -> float:
        """`self_distance` under a name: measured at the first call."""
        if name not in self.nulls:
            self.nulls[name] = self_distance(self.mass.shape[-1], seed, distance)
        return self.nulls[name]


def of_blocks(model: ProbedModel, kept: Sequence[int]) -> ProbedModel:
    """What a model shows of some of its blocks, as if the others were not there."""
    table, stream = copy.copy(model.survey.table), copy.copy(model.survey.stream)
    table.sink_mass = [table.sink_mass[index] for index in kept]
    table.layers = [table.layers[index] for index in kept]
    places = [place for place, name in enumerate(stream.names)
              if name == "embedding" or int(name.split(".")[1]) in kept]
    for key in ("names", "median", "top_values", "top_channels"):
        setattr(stream, key, [getattr(stream, key)[place] for place in places])
    layers = [model.layers[index] for index in kept]
    return replace(model, survey=replace(model.survey, table=table, stream=stream), layers=layers,
                   mass=torch.cat(layers), nulls={})


def bernoulli_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of (p, 1 - p) from (q, 1 - q) in nats, for masses on the sinks and elsewhere."""
    p, q = (x.double().clamp(1e-6, 1 - 1e-6) for x in (p, q))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def massive_entries(found: RowSurvey, rows: Rows | None = None) -> Entries:
    """(boundary, channel, on a sink) -> largest |h| over the boundary's median, for the largest channels of tokens."""
    entries: Entries = {}
    picked = slice(None) if rows is None else rows
    for boundary, (values, channels) in enumerate(zip(found.stream.top_values, found.stream.top_channels, strict=True)):
        ratios = values[picked] / max(found.stream.median[boundary], 1e-30)
        for on_sink in (False, True):
            here = found.sinks[picked] == on_sink
            ids, inverse = channels[picked][here].flatten().unique(return_inverse=True)
            peaks = torch.zeros(len(ids)).scatter_reduce_(0, inverse, ratios[here].flatten(), "amax")
            entries |= {(boundary, int(i), on_sink): float(peak) for i, peak in zip(ids, peaks, strict=True)}
    return entries


def overlap_and_ratio(a: Entries, b: Entries,
                      threshold: float) -> tuple[float, float] | None:
    """Share of massive activations that both have, and the median of their ratios b / a.

    An entry of `a` over the threshold is kept if `b` has at least half of it; an entry of `b` over the threshold is new
    if `a` has less than half of it. None where `a` has none.
    """
    mine = {key: value for key, value in a.items() if value >= threshold}
    if not mine:
        return None
    kept = sum(b.get(key, 0.0) >= value / 2 for key, value in mine.items())
    new = sum(value >= threshold and a.get(key, 0.0) < value / 2 for key, value in b.items())
    return kept / (len(mine) + new), median(b.get(key, 0.0) / value for key, value in mine.items())


def _check(name: str, what: str, value: float | None, ideal: float, null: float) -> FidelityCheck:
    bound = max(null, TOLERANCES.get(name, 0.0))
    kept = None if value is None or name not in TOLERANCES else abs(value - ideal) <= bound
    return FidelityCheck(name=name, what=what, value=value, ideal=ideal, null=null, bound=bound, kept=kept)


def attention_checks(a: ProbedModel, b: ProbedModel, seed: int) -> list[FidelityCheck]:
    def rate(side: ProbedModel, rows: Rows) -> float:
        return float((side.mass[..., rows] > SINK).double().mean())

    def divergence(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(bernoulli_divergence(one.mean(-1), two.mean(-1)).mean())

    def dormant(on: torch.Tensor, rows: Rows) -> torch.Tensor:
        return on[..., rows].mean(-1) <= 1 - DORMANT

    def strength(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(two.mean() / one.mean().clamp(min=1e-30))

    everything = torch.arange(a.mass.shape[-1])
    on_a, on_b = _on_rates(a), _on_rates(b)
    return [
        _check("sink_rate", f"sink rate at {SINK:g} on the detected sinks, quantized - original",
               rate(b, everything) - rate(a, everything), 0,
               a.null("sink_rate", seed, lambda r, s: abs(rate(a, r) - rate(a, s)))),
        _check("head_divergence", "divergence of every head's sink mass, mean over heads, nats",
               divergence(a.mass, b.mass), 0,
               a.null("head_divergence", seed, lambda r, s: divergence(a.mass[..., r], a.mass[..., s]))),
        _check("no_op_heads", "share of heads that became dormant or woke up",
               float((dormant(on_a, everything) != dormant(on_b, everything)).double().mean()), 0,
               a.null("no_op_heads", seed, lambda r, s: float((dormant(on_a, r) != dormant(on_a, s)).double().mean()))),
        _check("spread", "change of later tokens after one is swapped, quantized / original",
               strength(a.spread, b.spread), 1,
               a.null("spread", seed, lambda r, s: abs(strength(a.spread[r], a.spread[s]) - 1)))]


def _on_rates(side: ProbedModel) -> torch.Tensor:
    """Share of queries for which a head is on, float64 [all heads, rows]."""
    queries = (~side.survey.sinks).double()
    queries[:, :min(EARLY, queries.shape[1] - 1)] = 0
    return torch.cat([(((mass < ON) * queries[:, None]).sum(-1) / queries.sum(-1).clamp(min=1)[:, None]).T
                      for mass in side.survey.table.sink_mass])


def massive_checks(a: ProbedModel, b: ProbedModel, threshold: float, seed: int, rotated: bool) -> list[FidelityCheck]:
    """rotated: whether the second's residual stream has other axes, so that channels cannot be compared."""
    found = None if rotated else overlap_and_ratio(massive_entries(a.survey), massive_entries(b.survey), threshold)
    why = "; not compared, the quantized model's residual stream is rotated" if rotated else ""
    overlap, ratio = (0.0, 0.0) if found is None else _massive_nulls(a, threshold, seed)
    return [_check("massive_overlap", f"massive activations that both have{why}", found and found[0], 1, overlap),
            _check("massive_ratio", f"size of the massive activations, quantized / original{why}",
                   found and found[1], 1, ratio)]


def _massive_nulls(a: ProbedModel, threshold: float, seed: int) -> tuple[float, float]:
    """Of both checks at once: what they compare is the same, and it is the slowest of all."""
    if "massive_overlap" not in a.nulls:
        pairs = [overlap_and_ratio(massive_entries(a.survey, r), massive_entries(a.survey, s), threshold)
                 for r, s in zip(*(part[:MASSIVE_HALVES] for part in halves(a.mass.shape[-1], seed)), strict=True)]
        for part, name in enumerate(("massive_overlap", "massive_ratio")):
            a.nulls[name] = level_of([0.0 if pair is None else abs(pair[part] - 1) for pair in pairs])
    return a.nulls["massive_overlap"], a.nulls["massive_ratio"]


def value_checks(a: ProbedModel, b: ProbedModel, seed: int) -> list[FidelityCheck]:
    def ratio(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((two.nanmean(-1).log() - one.nanmean(-1).log()).nanmean().exp())

    def itself(norms: torch.Tensor) -> Callable[[Rows, Rows], float]:
        return lambda r, s: abs(ratio(norms[..., r], norms[..., s]) - 1)

    checks = []
    for name, what, drain in (("value_norm", "norm of the sinks' values, quantized / original", False),
                              ("value_drain", "that norm over the median norm, quantized / original", True)):
        before, after = (_sink_norms(side.survey, drain) for side in (a, b))
        null = a.null(name, seed, itself(before))
        checks.append(_check(name, what, ratio(before, after), 1, 0.0 if math.isnan(null) else null))
    return checks


def _sink_norms(found: RowSurvey, drain: bool) -> torch.Tensor:
    """Mean norm of the sinks' values, over the median of the others' with `drain`: float64 [all KV heads, rows],
    NaN in rows that hold no sink."""
    sinks, layers = found.sinks[:, None], []
    for layer in found.table.layers:
        norms = layer.value_norms.double()
        mean = norms.masked_fill(~sinks, torch.nan).nanmean(-1)
        if drain:
            mean = mean / norms.masked_fill(sinks, torch.nan).nanmedian(-1).values.clamp(min=1e-30)
        layers.append(mean.T)
    return torch.cat(layers).clamp(min=1e-30)


def kl_checks(kl: torch.Tensor, marked: torch.Tensor, seed: int) -> list[FidelityCheck]:
    """At the sinks, beside as many random other positions; and elsewhere, beside its own halves."""
    others = kl[~marked]
    generator = torch.Generator().manual_seed(seed)
    count = int(marked.sum())
    draws = torch.stack([others[torch.randint(len(others), (count,), generator=generator)].mean() for _ in range(200)])
    rows = torch.where(marked, 0, kl).sum(1) / (~marked).sum(1).clamp(min=1)
    return [_check("kl_sinks", "KL of the outputs at sink positions, nats; null: at as many other positions",
                   float(kl[marked].mean()), 0, float(torch.quantile(draws, 0.95))),
            _check("kl_elsewhere", "KL of the outputs elsewhere, nats; null: between halves of the text",
                   float(others.mean()), 0,
                   self_distance(len(rows), seed, lambda r, s: abs(float(rows[r].mean() - rows[s].mean()))))]
