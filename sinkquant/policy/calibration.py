"""What tokens weigh in the statistics of a plan, and the rows that they are taken over."""

from __future__ import annotations

from sinkquant.artifacts import Calibration, SinkMap, WeighedSink
from sinkquant.artifacts.plan import Statistics
from sinkquant.recipe import Recipe


def sink_selectors(sink_map: SinkMap, recipe: Recipe) -> list[WeighedSink]:
    """What every sink token weighs in the statistics: as often as it is read, over as often as it stands there, and at
    most `protect.sink_weight`. A delimiter in every sentence is read by the few tokens after it; `<bos>` stands in a
    row once and is read by all of it."""
    selectors = []
    for token in sink_map.placed:
        share = 1 / recipe.calibration.length if token.position is not None else token.share
        weight = min(recipe.protect.sink_weight, max(1.0, token.attention / max(share, 1e-9)))
        selectors.append(WeighedSink(token_id=token.token_id, position=token.position, weight=weight))
    return selectors


def calibration_of(recipe: Recipe, sink_map: SinkMap | None) -> Calibration:
    """The rows that a recipe asks for and what tokens weigh in them, for statistics that are taken beside a plan.

    Args:
        sink_map: None where no token is a sink.
    """
    sinks = sink_selectors(sink_map, recipe) if recipe.protect.tokens and sink_map is not None else []
    return calibration(recipe, sinks, recipe.statistics)


def calibration(recipe: Recipe, sinks: list[WeighedSink], statistics: Statistics) -> Calibration:
    settings, weights = recipe.calibration, recipe.weights
    return Calibration(
        text=settings.text, rows=settings.rows, length=settings.length, bos=settings.bos,
        batch_size=settings.batch_size, sinks=sinks, damping=weights.damping, act_order=weights.act_order,
        scale_search=weights.scale_search, descent=weights.descent, tune=weights.tune, distill=weights.distill,
        distill_codes=weights.distill_codes,
        statistics=statistics, min_expert_tokens=settings.min_expert_tokens)
