"""The cheap estimate: one walk back, and the loss of every candidate to second order.

An output error e = dW x at a position adds g . e to the log-likelihood of a label y, g its gradient there; with y drawn
from the model itself the expected square is e^T F e, F the Fisher information, and half of it the KL divergence from
the unquantized model to second order (Martens 1412.1193). Errors at the sinks of a row are one error: their inputs
hardly differ, so their g . e are summed before they are squared. Those of other positions are as good as independent
and are squared one by one, which has far less variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sinkquant.artifacts import EndLoss, FormatLoss, Terms, UnitSensitivity
from sinkquant.artifacts.ends import EndDecision
from sinkquant.models import Decoder, Walk
from sinkquant.models.backward import steps_back
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.candidates import TrialFormat, Unit, errors
from sinkquant.sensitivity.ends import embedding_loss, head_loss
from sinkquant.sensitivity.seen import Seen

Progress = Callable[[int, int, str], None]


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
    found: dict[int, UnitSensitivity] = {}
    count = len(decoder.blocks)
    for done, back in enumerate(steps_back(walk, recipe.seed)):
        if not done:
            of_ends += [head_loss(walk, back.ended, end, recipe) for kind, end in ends if kind == "head"]
        mine = {index: unit for index, unit in enumerate(units) if unit.block == back.step.index}
        if recipe.statistics == "attention":
            weights.enter(back.step)
        seen = Seen(back, decoder, list(mine.values()), weights, recipe)
        for index, unit in mine.items():
            found[index] = _unit(unit, decoder, seen, sinks, recipe)
            for name in unit.modules:
                seen.linears.pop(name, None)
        if progress:
            progress(done + 1, count, "sensitivities")
    of_ends += [embedding_loss(walk, back.gradients, end, recipe) for kind, end in ends if kind == "embedding"]
    return [found[index] for index in range(len(units))], of_ends


def _unit(unit: Unit, decoder: Decoder, seen: Seen, sinks: torch.Tensor, recipe: Recipe) -> UnitSensitivity:
    tokens = sinks.numel()
    scores = {one: torch.zeros(tokens, dtype=torch.float64) for one in unit.candidates}
    routed: dict[TrialFormat, float] = dict.fromkeys(unit.candidates, 0.0)
    diagonal: dict[TrialFormat, float] = dict.fromkeys(unit.candidates, 0.0)
    placed = True
    # Linears that engines fuse read one input; experts of a layer get tokens of their own.
    together = [[name] for name in unit.modules] if unit.owner else [unit.modules]
    for names in together:
        parts, hessian = seen.of(unit, names[0])
        seen_by = {names[0]: parts} | {name: seen.of(unit, name)[0] for name in names[1:]}
        for candidate, changes in errors(decoder, names, hessian, unit.candidates, recipe, decoder.model.dtype):
            for name, error in changes.items():
                for part in seen_by[name]:
                    pulled = part.gradients.float() * (part.inputs.float() @ error.T)
                    diagonal[candidate] += float(pulled.square().sum())
                    score = pulled.sum(-1).double().cpu()
                    if part.places is None:
                        placed = False
                        routed[candidate] += float(score.square().sum())
                    else:
                        scores[candidate].index_add_(0, part.places, score)
    losses = []
    for candidate in unit.candidates:
        score = scores[candidate].reshape(sinks.shape)
        through = float(score.where(sinks, 0.0).sum(1).square().sum()) / 2 / tokens
        others = (float(score.where(~sinks, 0.0).square().sum()) + routed[candidate]) / 2 / tokens
        losses.append(FormatLoss(
            bits=candidate.bits, group_size=candidate.group_size, method=candidate.method,
            columns=len(candidate.columns), scalars=len(candidate.scalars), storage=candidate.storage,
            predicted=Terms(sinks=through, others=others, total=through + others),
            diagonal=diagonal[candidate] / 2 / tokens))
    return UnitSensitivity(modules=list(unit.modules), placed=placed, losses=losses)
