"""The cheap estimate: one walk back, and the loss of every candidate to second order.

An output error e = dW x at a position adds g . e to the log-likelihood of a label y, g its gradient there; with y drawn
from the model itself the expected square is e^T F e, F the Fisher information, and half of it the KL divergence from
the unquantized model to second order (Martens 1412.1193). Errors at the sinks of a row are one error: their inputs
hardly differ, so their g . e are summed before they are squared. Those of other positions are as good as independent
and are squared one by one, which has far less variance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sinkquant.artifacts import FormatLoss, Terms, UnitSensitivity
from sinkquant.models import Decoder, Walk
from sinkquant.models.backward import steps_back
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.candidates import TrialFormat, Unit, errors
from sinkquant.sensitivity.seen import Seen

Progress = Callable[[int, int, str], None]


def estimate(walk: Walk, units: list[Unit], sinks: torch.Tensor, weights: TokenWeights, recipe: Recipe,
             progress: Progress | None = None) -> list[UnitSensitivity]:
    """The predicted loss of every unit in every candidate format, in the order of the units.

    Args:
        walk: a walk that has not begun, over the rows. sinks: bool [rows, length].
        weights: what tokens weigh in the Hessians of the candidates that have one.
    """
    decoder = walk.decoder
    found: dict[int, UnitSensitivity] = {}
    count = len(decoder.blocks)
    for done, back in enumerate(steps_back(walk, recipe.seed)):
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
    return [found[index] for index in range(len(units))]


def _unit(unit: Unit, decoder: Decoder, seen: Seen, sinks: torch.Tensor, recipe: Recipe) -> UnitSensitivity:
    tokens = sinks.numel()
    scores = {one: torch.zeros(tokens, dtype=torch.float64) for one in unit.candidates}
    routed: dict[TrialFormat, float] = dict.fromkeys(unit.candidates, 0.0)
    diagonal: dict[TrialFormat, float] = dict.fromkeys(unit.candidates, 0.0)
    placed = True
    for name in unit.modules:
        parts, hessian = seen.of(unit, name)
        for candidate, error in errors(decoder, name, hessian, unit.candidates, recipe, decoder.model.dtype):
            for part in parts:
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
