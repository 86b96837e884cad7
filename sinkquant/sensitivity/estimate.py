"""The cheap estimate: one walk back, and the loss of every candidate to second order.

An output error e = dW x at a position adds g . e to the log-likelihood of a label y, g its gradient there; with y drawn
from the model itself the expected square is e^T F e, F the Fisher information, and half of it the KL divergence from
the unquantized model to second order (Martens 1412.1193). Errors at the sinks of a row are one error: their inputs
hardly differ, so their g . e are summed before they are squared. Those of other positions are squared one by one, which
has far less variance; what they have in common is a factor of all linears by one method (`_shared`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from sinkquant.artifacts import EndLoss, FormatLoss, Terms, UnitSensitivity
from sinkquant.artifacts.ends import EndDecision
from sinkquant.methods import method_named
from sinkquant.models import Decoder, Walk
from sinkquant.models.backward import steps_back
from sinkquant.models.steps import Progress
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.candidates import TrialFormat, Unit, errors
from sinkquant.sensitivity.ends import embedding_loss, head_loss
from sinkquant.sensitivity.seen import Seen

Pair = tuple[float, float]
ENOUGH = 4
"""Rows from which on it can be told what tokens of a row lose together."""


def estimate(walk: Walk, units: list[Unit], sinks: torch.Tensor, weights: TokenWeights, recipe: Recipe,
             ends: Sequence[tuple[str, EndDecision]] = (),
             progress: Progress | None = None) -> tuple[list[UnitSensitivity], list[EndLoss]]:
    """The predicted loss of every unit in every candidate format, in the order of the units; and of every candidate of
    the embedding and the head.

    Args:
        walk: a walk that has not begun, over the rows. sinks: bool [rows, length].
        weights: what tokens weigh in the Hessians of the candidates that have one.
        ends: kind and format of these (`end_candidates`).
    """
    decoder, of_ends = walk.decoder, []
    found: dict[int, tuple[UnitSensitivity, dict[TrialFormat, Pair]]] = {}
    count, scored = len(decoder.blocks), first_scored(units, len(walk.rows))
    for done, back in enumerate(steps_back(walk, recipe.seed)):
        if not done:
            of_ends += [head_loss(walk, back.ended, end, recipe) for kind, end in ends if kind == "head"]
        mine = {index: unit for index, unit in enumerate(units) if unit.block == back.step.index}
        if recipe.statistics == "attention":
            weights.enter(back.step)
        seen = Seen(back, decoder, list(mine.values()), weights, recipe, scored or None)
        for index, unit in mine.items():
            found[index] = _unit(unit, decoder, seen, sinks, recipe, 0 if unit.owner else scored)
            for name in unit.modules:
                seen.linears.pop(name, None)
        if progress:
            progress(done + 1, count, "sensitivities")
    of_ends += [embedding_loss(walk, back.gradients, end, recipe) for kind, end in ends if kind == "embedding"]
    several = len(walk.rows) - scored >= ENOUGH
    made = [found[index] for index in range(len(units))]
    return _shared(made) if several else [unit for unit, _ in made], of_ends


def first_scored(units: Sequence[Unit], rows: int) -> int:
    """The row from which on losses are taken. A method that fits its codes to the rows of a Hessian loses less on
    these than on any others, so that a quarter of the rows is kept out of it."""
    fitted = any(method_named(one.method).needs_hessian for unit in units for one in unit.candidates)
    return rows - max(1, rows // 4) if fitted and rows > 1 else 0


def _shared(found: Sequence[tuple[UnitSensitivity, dict[TrialFormat, Pair]]]) -> list[UnitSensitivity]:
    """The losses with what tokens of a row lose together. Linear by linear, and format by format, that has too much
    variance: it is a factor by method, the mean over the formats of what all linears together show."""
    sums: dict[tuple[str, int, int], list[float]] = {}
    for _, pairs in found:
        for one, pair in pairs.items():
            into = sums.setdefault((one.method, one.bits, one.group_size), [0.0, 0.0])
            into[0] += pair[0]
            into[1] += pair[1]
    ratios: dict[str, list[float]] = {}
    for (method, _, _), (apart, together) in sums.items():
        if apart > 0:
            ratios.setdefault(method, []).append(together / apart)

    def changed(loss: FormatLoss) -> FormatLoss:
        factor = statistics.fmean(ratios.get(loss.method, [1.0]))
        sinks, others = loss.predicted.sinks, factor * loss.predicted.others
        return loss.model_copy(update={
            "predicted": Terms(sinks=sinks, others=others, total=sinks + others), "shared": factor})

    return [unit.model_copy(update={"losses": [changed(loss) for loss in unit.losses]}) if unit.placed else unit
            for unit, _ in found]


def _unit(unit: Unit, decoder: Decoder, seen: Seen, sinks: torch.Tensor, recipe: Recipe,
          first: int) -> tuple[UnitSensitivity, dict[TrialFormat, Pair]]:
    """Its losses on the rows from `first` on; and for every candidate the squares of what other tokens than sinks lose,
    one by one and by row."""
    tokens, all_tokens = sinks[first:].numel(), sinks.numel()
    scores = {one: torch.zeros(all_tokens, dtype=torch.float64) for one in unit.candidates}
    routed: dict[TrialFormat, float] = dict.fromkeys(unit.candidates, 0.0)
    diagonal: dict[TrialFormat, float] = dict.fromkeys(unit.candidates, 0.0)
    placed = True
    for names in unit.by_input:
        hessian = seen.of(unit, names[0])[1]
        seen_by = {name: [part.after(first, sinks.shape[1]) for part in seen.of(unit, name)[0]] for name in names}
        for candidate, changes in errors(decoder, names, hessian, unit.candidates, recipe, decoder.model.dtype):
            for name, error in changes.items():
                for part in seen_by[name]:
                    pulled = part.gradients.float() * (part.inputs.float() @ error.T)
                    score = pulled.sum(-1).double().cpu()
                    # Where it is not known which row a token is of, all rows are scored.
                    share = 1.0 if part.places is not None else tokens / all_tokens
                    diagonal[candidate] += share * float(pulled.square().sum())
                    if part.places is None:
                        placed = False
                        routed[candidate] += share * float(score.square().sum())
                    else:
                        scores[candidate].index_add_(0, part.places, score)
    losses, pairs = [], {}
    for candidate in unit.candidates:
        score = scores[candidate].reshape(sinks.shape)
        through = float(score.where(sinks, 0.0).sum(1).square().sum()) / 2 / tokens
        apart = score.where(~sinks, 0.0)
        pairs[candidate] = float(apart.square().sum()), float(apart.sum(1).square().sum())
        others = (pairs[candidate][0] + routed[candidate]) / 2 / tokens
        losses.append(FormatLoss(
            bits=candidate.bits, group_size=candidate.group_size, method=candidate.method,
            columns=len(candidate.columns), scalars=len(candidate.scalars), storage=candidate.storage,
            predicted=Terms(sinks=through, others=others, total=through + others),
            diagonal=diagonal[candidate] / 2 / tokens))
    return UnitSensitivity(modules=list(unit.modules), placed=placed, losses=losses), pairs if placed else {}
