"""Which blocks a model can do without: chosen one after the other by what their absence is measured to cost.

Greedy, as SLEB is (arXiv 2402.09025), and lazy: a block that cost much alone is only measured again, beside those that
are gone, where the cheapest of the others have come to cost as much. The proxy of ShortGPT (arXiv 2403.03853), how
little a block turns the residual stream, stands beside it and may be asked for where a pass per block is too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.blocks import BlockCost, BlockPlan, DroppedBlock
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.blocks.measure import BlockTrials, Loss, Progress
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, pick_device, read_text, require_dense, token_rows
from sinkquant.models.numerics import own_numerics
from sinkquant.models.shorter import require_blocks_apart, shorter_model
from sinkquant.models.unused import require_nothing_carried
from sinkquant.policy.blocks import blocks_to_drop, massive_blocks, require_enough
from sinkquant.recipe import Recipe
from sinkquant.sinks import SinkSelector

ROWS = 16
"""Rows of detection's length that a block's absence is measured on."""
AGAIN = 4
"""Blocks that are measured again together once others are gone."""


def require_droppable(decoder: Decoder, recipe: Recipe) -> int:
    """The number of blocks that a recipe drops, 0 for none; nothing is read or computed.

    Raises:
        RequestError: it is none or leaves none, or the model cannot be built without its first or its last blocks.
    """
    count = blocks_to_drop(recipe.prune, len(decoder.blocks))
    if count:
        require_nothing_carried(decoder.model, "blocks that are left")
        require_blocks_apart(decoder.model)
        every = range(len(decoder.blocks))
        attending = next(block for block in every if block not in decoder.quiet)
        for kept in (list(every[count:]), list(every[:-count])):
            if all(block in decoder.quiet for block in kept):  # one with attention always stays
                kept[0] = attending
            shorter_model(decoder.model, sorted(kept))
    return count


@own_numerics()
def choose_blocks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap, recipe: Recipe,
                  progress: Progress | None = None) -> BlockPlan:
    """Choose the blocks that `prune.blocks` of a recipe drops; the model is not changed.

    Args:
        model: from `open_model`, or one in memory. sink_map: of this model.

    Raises:
        RequestError: the recipe drops none, more than there are, more than hold no massive activation up, or the model
            cannot be built without them.
    """
    decoder = Decoder.of(model)
    require_dense(model)
    count, settings = require_droppable(decoder, recipe), recipe.prune
    if not count:
        raise RequestError("the recipe drops no blocks; set prune.blocks to a number or a share.")
    emergence, end = massive_blocks(sink_map)
    named: dict[int, Literal["emerge", "end"]] = {}
    if end is not None:
        named[end] = "end"
    if emergence is not None:
        named[emergence] = "emerge"
    held = {} if settings.massive and settings.block_score == "divergence" else named
    require_enough(count, len(decoder.blocks), dict(held), settings)
    content = read_text(recipe.calibration.text, "calibration", tokenizer)
    rows = token_rows(tokenizer, content, min(ROWS, recipe.detect.rows), recipe.detect.length, recipe.calibration.bos,
                      decoder.vocabulary, key="detect.length")
    marked = SinkSelector.of(sink_map.tokens).mask(rows)
    marked[:, 0] = True
    trials = BlockTrials(decoder, rows, marked, recipe.detect.batch_size, pick_device(recipe.compute.device),
                         getattr(torch, recipe.compute.dtype), progress)
    every = range(len(decoder.blocks))
    attending = frozenset(every) - decoder.quiet.keys()
    if settings.block_score == "influence":
        trials.losses([])
        alone: dict[int, Loss] = {}
        order: list[int] = []
        for block in sorted(every, key=lambda block: (trials.influence[block], block)):
            if block not in held and len(order) < count and not attending <= {*order, block}:
                order.append(block)
        lost = trials.losses([frozenset(order[:place + 1]) for place in range(count)])
        chosen = list(zip(order, lost, strict=True))
    else:
        alone = dict(zip(every, trials.losses([frozenset((block,)) for block in every]), strict=True))
        chosen = _greedy(trials, {block: loss for block, loss in alone.items() if block not in held}, count,
                         attending)
    gone = {block for block, _ in chosen}
    kept = [block for block in every if block not in gone]
    shorter_model(model, kept)  # says what cannot be built
    costs = [BlockCost(block=block, divergence=alone[block].divergence if alone else None,
                       sink_share=alone[block].sink_share if alone else None, influence=trials.influence[block],
                       massive=named.get(block)) for block in every]
    return BlockPlan(
        kept=kept, emergence=emergence, end=end, score=settings.block_score, rows=len(rows), length=rows.shape[1],
        whole_bytes=checkpoint_bytes(decoder.shape(""), {}), costs=costs,
        dropped=[DroppedBlock(block=block, divergence=loss.divergence, sink_share=loss.sink_share,
                              reason=_reason(costs[block], loss, place)) for place, (block, loss) in enumerate(chosen)])


def _greedy(trials: BlockTrials, known: Mapping[int, Loss], count: int,
            attending: frozenset[int]) -> list[tuple[int, Loss]]:
    """Blocks in the order in which they go, each with what the model loses without it and those before.

    Args:
        known: block -> what its absence costs alone, for every block that may go. attending: the blocks with attention,
            one of which stays.
    """
    costs, chosen, gone = dict(known), [], frozenset[int]()
    for place in range(count):
        for block in [block for block in costs if attending <= gone | {block}]:
            del costs[block]
        fresh = dict(costs) if place == 0 else {}
        while True:
            order = sorted(costs, key=lambda block: (costs[block].divergence, block))
            if order[0] in fresh:  # no other can be less, unless it costs less now than it did with more blocks
                break
            again = [block for block in order if block not in fresh][:AGAIN]
            measured = dict(zip(again, trials.losses([gone | {block} for block in again]), strict=True))
            fresh |= measured
            costs |= measured
        best = order[0]
        chosen.append((best, costs.pop(best)))
        gone |= {best}
    return chosen


def _reason(cost: BlockCost, loss: Loss, place: int) -> str:
    together = "" if place == 0 else f", {loss.divergence:.3g} together with the {place} before it"
    if cost.divergence is None:
        return f"its influence of {cost.influence:.3g} is the least of those that are left{together}"
    return f"without it the model diverges by {cost.divergence:.3g} nats per token{together}"
