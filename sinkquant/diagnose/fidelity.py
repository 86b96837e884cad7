"""Sink fidelity: did a quantized model keep the sinks of its original?

Both models run over the same rows. Every figure stands beside its null: the same distance between the original and
itself on other text (random halves of the rows). A figure is out of bounds where it is farther from its ideal than
both the null and a tolerance: some sinks are the same on every text, and without a tolerance any rounding would count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkFidelity, SinkToken
from sinkquant.artifacts.fidelity import FidelityCheck, SpreadCurve
from sinkquant.diagnose.dormant import DORMANT, EARLY, ON
from sinkquant.diagnose.null import self_distance
from sinkquant.diagnose.rows import mark_sinks
from sinkquant.diagnose.sample import attention_of, attention_sample
from sinkquant.diagnose.spread import changes
from sinkquant.diagnose.survey import Compute, Survey, survey
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, pick_device, read_text, starts_with_bos, token_rows
from sinkquant.recipe import Recipe

ROWS, LENGTH = 32, 128
FEW_ROWS = 16
SINK = 0.3
DESTROYED = 0.5
"""The sinks are destroyed where the heads that sink keep less than this share of the mass they gave them."""
ROTATED = 0.3
"""Relative difference of the token embeddings, which quantization leaves alone, from which on they are rotated."""
TOLERANCES = {"sink_rate": 0.05, "head_divergence": 0.02, "massive_overlap": 0.2, "massive_ratio": 0.25,
              "value_norm": 0.25, "value_drain": 0.25, "spread": 0.25, "no_op_heads": 0.1, "kl_sinks": 0.05}

Rows = torch.Tensor
"""int64, indices of rows."""


@dataclass(frozen=True)
class _Side:
    """One model on the rows.

    Attributes:
        layers: by layer [heads, rows], mean attention on the sinks; mass: the same of all heads, [all heads, rows].
        spread: [rows], mean change of later tokens after the one at `position` is swapped; curve: at every position.
    """

    survey: Survey
    layers: list[torch.Tensor]
    mass: torch.Tensor
    position: int
    spread: torch.Tensor
    curve: list[float]


def sink_fidelity(original: PreTrainedModel, quantized: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                  sinks: Sequence[SinkToken], recipe: Recipe | None = None, text: str | None = None) -> SinkFidelity:
    """Compare a quantized model with its original.

    Args:
        sinks: the sink tokens of the original, as `detect` finds them.
        text: a file of text; None for the recipe's evaluation text, or the packaged one.

    Raises:
        RequestError: the two are not the same architecture, or the text is too short.
    """
    recipe = recipe or Recipe()
    compute = Compute(pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype), recipe.seed)
    first, second = Decoder.of(original), Decoder.of(quantized)
    if (first.hidden_size, len(first.blocks), first.vocabulary) != (
            second.hidden_size, len(second.blocks), second.vocabulary):
        raise RequestError("the two models differ in width, depth or vocabulary: one is not the other quantized.")
    content = read_text(text or recipe.evaluate.text, "evaluation", tokenizer)
    rows = token_rows(tokenizer, content, ROWS, min(LENGTH, first.max_length), recipe.calibration.bos,
                      first.vocabulary, "evaluation text")
    marked = mark_sinks(rows, sinks)
    a, b = (_side(decoder, rows, marked, compute) for decoder in (first, second))
    kl = position_divergence(original, quantized, rows)
    curves = [SpreadCurve(with_bos=starts_with_bos(tokenizer, recipe.calibration.bos), position=a.position,
                          before=a.curve, after=b.curve)]
    if curves[0].with_bos:
        bare = [changes(decoder, rows[:FEW_ROWS, 1:], a.position - 1, compute)[-1].mean(0).tolist()
                for decoder in (first, second)]
        curves.append(SpreadCurve(with_bos=False, position=a.position - 1, before=bare[0], after=bare[1]))
    sample = attention_sample(attention_of(first, rows[0], compute), attention_of(second, rows[0], compute), rows[0],
                              tokenizer)
    rotated = _rotated(original, quantized)
    checks = [*_attention_checks(a, b, compute.seed),
              *_massive_checks(a, b, recipe.detect.massive_ratio, compute.seed, rotated),
              *_value_checks(a, b, compute.seed), *_kl_checks(kl, marked, compute.seed)]
    verdict, sentence = _judge(checks, a.mass.mean(-1), b.mass.mean(-1), bool(sinks))
    return SinkFidelity(
        verdict=verdict, sentence=sentence, checks=checks, rows=len(rows), length=rows.shape[1],
        heads=[bernoulli_divergence(one.mean(-1), two.mean(-1)).tolist()
               for one, two in zip(a.layers, b.layers, strict=True)],
        mass=[layer.mean(-1).tolist() for layer in b.layers],
        mass_before=[layer.mean(-1).tolist() for layer in a.layers], spread=curves, sample=sample)


def bernoulli_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of (p, 1 - p) from (q, 1 - q) in nats, for masses on the sinks and elsewhere."""
    p, q = (x.double().clamp(1e-6, 1 - 1e-6) for x in (p, q))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def position_divergence(original: PreTrainedModel, quantized: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """KL(original || quantized) of the next token at every position, float64 [rows, length], in nats."""
    found = []
    with torch.no_grad():
        for row in rows.split(1):
            p, q = (torch.log_softmax(model(row.to(model.device), use_cache=False).logits.float(), dim=-1).cpu()
                    for model in (original, quantized))
            found.append((p.exp() * (p - q)).sum(-1).double().clamp(min=0))
    return torch.cat(found)


def massive_entries(found: Survey, rows: Rows | None = None) -> dict[tuple[int, int, bool], float]:
    """(boundary, channel, on a sink) -> largest |h| over the boundary's median, for the largest channels of tokens."""
    entries: dict[tuple[int, int, bool], float] = {}
    picked = slice(None) if rows is None else rows
    for boundary, (values, channels) in enumerate(zip(found.stream.top_values, found.stream.top_channels, strict=True)):
        ratios = values[picked] / max(found.stream.median[boundary], 1e-30)
        for on_sink in (False, True):
            here = found.sinks[picked] == on_sink
            ids, inverse = channels[picked][here].flatten().unique(return_inverse=True)
            peaks = torch.zeros(len(ids)).scatter_reduce_(0, inverse, ratios[here].flatten(), "amax")
            entries |= {(boundary, int(i), on_sink): float(peak) for i, peak in zip(ids, peaks, strict=True)}
    return entries


def overlap_and_ratio(a: dict[tuple[int, int, bool], float], b: dict[tuple[int, int, bool], float],
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


def _side(decoder: Decoder, rows: torch.Tensor, marked: torch.Tensor, compute: Compute) -> _Side:
    found = survey(decoder, rows, marked, compute, ranks=False)
    position = rows.shape[1] // 4
    moved = changes(decoder, rows, position, compute)[-1]
    layers = found.head_mass()
    return _Side(found, layers, torch.cat(layers), position, moved[:, position + 1:].mean(1), moved.mean(0).tolist())


def _check(name: str, what: str, value: float | None, ideal: float, null: float) -> FidelityCheck:
    bound = max(null, TOLERANCES.get(name, 0.0))
    kept = None if value is None or name not in TOLERANCES else abs(value - ideal) <= bound
    return FidelityCheck(name=name, what=what, value=value, ideal=ideal, null=null, bound=bound, kept=kept)


def _attention_checks(a: _Side, b: _Side, seed: int) -> list[FidelityCheck]:
    count = a.mass.shape[-1]

    def rate(side: _Side, rows: Rows) -> float:
        return float((side.mass[..., rows] > SINK).double().mean())

    def divergence(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(bernoulli_divergence(one.mean(-1), two.mean(-1)).mean())

    def dormant(on: torch.Tensor, rows: Rows) -> torch.Tensor:
        return on[..., rows].mean(-1) <= 1 - DORMANT

    def strength(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(two.mean() / one.mean().clamp(min=1e-30))

    everything = torch.arange(count)
    on_a, on_b = _on_rates(a), _on_rates(b)
    return [
        _check("sink_rate", f"sink rate at {SINK:g} on the detected sinks, quantized - original",
               rate(b, everything) - rate(a, everything), 0,
               self_distance(count, seed, lambda r, s: abs(rate(a, r) - rate(a, s)))),
        _check("head_divergence", "divergence of every head's sink mass, mean over heads, nats",
               divergence(a.mass, b.mass), 0,
               self_distance(count, seed, lambda r, s: divergence(a.mass[..., r], a.mass[..., s]))),
        _check("no_op_heads", "share of heads that became dormant or woke up",
               float((dormant(on_a, everything) != dormant(on_b, everything)).double().mean()), 0,
               self_distance(count, seed, lambda r, s: float((dormant(on_a, r) != dormant(on_a, s)).double().mean()))),
        _check("spread", "change of later tokens after one is swapped, quantized / original",
               strength(a.spread, b.spread), 1,
               self_distance(count, seed, lambda r, s: abs(strength(a.spread[r], a.spread[s]) - 1)))]


def _on_rates(side: _Side) -> torch.Tensor:
    """Share of queries for which a head is on, float64 [all heads, rows]."""
    queries = (~side.survey.sinks).double()
    queries[:, :min(EARLY, queries.shape[1] - 1)] = 0
    return torch.cat([(((mass < ON) * queries[:, None]).sum(-1) / queries.sum(-1).clamp(min=1)[:, None]).T
                      for mass in side.survey.table.sink_mass])


def _rotated(original: PreTrainedModel, quantized: PreTrainedModel) -> bool:
    """Whether the residual stream of the second has other axes: its token embeddings are quite different."""
    first, second = (model.get_input_embeddings().weight.detach().float().cpu() for model in (original, quantized))
    return float((first - second).norm()) > ROTATED * float(first.norm())


def _massive_checks(a: _Side, b: _Side, threshold: float, seed: int, rotated: bool) -> list[FidelityCheck]:
    found = None if rotated else overlap_and_ratio(massive_entries(a.survey), massive_entries(b.survey), threshold)
    why = "; not compared, the quantized model's residual stream is rotated" if rotated else ""

    def itself(part: int, ideal: float) -> Callable[[Rows, Rows], float]:
        def distance(r: Rows, s: Rows) -> float:
            pair = overlap_and_ratio(massive_entries(a.survey, r), massive_entries(a.survey, s), threshold)
            return 0.0 if pair is None else abs(pair[part] - ideal)
        return distance

    nulls = (0.0, 0.0) if found is None else tuple(
        self_distance(a.mass.shape[-1], seed, itself(part, 1), count=20) for part in (0, 1))
    return [_check("massive_overlap", f"massive activations that both have{why}", found and found[0], 1, nulls[0]),
            _check("massive_ratio", f"size of the massive activations, quantized / original{why}",
                   found and found[1], 1, nulls[1])]


def _value_checks(a: _Side, b: _Side, seed: int) -> list[FidelityCheck]:
    def ratio(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((two.nanmean(-1).log() - one.nanmean(-1).log()).nanmean().exp())

    def itself(norms: torch.Tensor) -> Callable[[Rows, Rows], float]:
        return lambda r, s: abs(ratio(norms[..., r], norms[..., s]) - 1)

    checks = []
    for name, what, drain in (("value_norm", "norm of the sinks' values, quantized / original", False),
                              ("value_drain", "that norm over the median norm, quantized / original", True)):
        before, after = (_sink_norms(side.survey, drain) for side in (a, b))
        null = self_distance(before.shape[-1], seed, itself(before))
        checks.append(_check(name, what, ratio(before, after), 1, 0.0 if math.isnan(null) else null))
    return checks


def _sink_norms(found: Survey, drain: bool) -> torch.Tensor:
    """Mean norm of the sinks' values, over the median of the others' with `drain`: float64 [all KV heads, rows],
    NaN in rows that hold no sink."""
    sinks, layers = found.sinks[:, None], []
    for values in found.table.value_norms:
        norms = values.double()
        mean = norms.masked_fill(~sinks, torch.nan).nanmean(-1)
        if drain:
            mean = mean / norms.masked_fill(sinks, torch.nan).nanmedian(-1).values.clamp(min=1e-30)
        layers.append(mean.T)
    return torch.cat(layers).clamp(min=1e-30)


def _kl_checks(kl: torch.Tensor, marked: torch.Tensor, seed: int) -> list[FidelityCheck]:
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


def _judge(checks: list[FidelityCheck], before: torch.Tensor, after: torch.Tensor,
           has_sinks: bool) -> tuple[Literal["kept", "changed", "destroyed", "no sinks"], str]:
    if not has_sinks:
        return "no sinks", "The original has no sinks that could be kept."
    heads = before >= SINK
    left = float(after[heads].sum() / before[heads].sum()) if heads.any() else 1.0
    if left < DESTROYED:
        return "destroyed", (f"The sinks are destroyed: the {int(heads.sum())} heads that sink give them {left:.0%} of "
                             "the attention that they gave before.")
    broken = [check.name for check in checks if check.kept is False]
    if broken:
        return "changed", f"The sinks are there but changed: out of bounds are {', '.join(broken)}."
    return "kept", "The sinks are kept: every check is within its bound."
