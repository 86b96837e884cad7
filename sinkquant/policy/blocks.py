"""How many blocks a recipe drops, and which of them hold massive activations up."""

from __future__ import annotations

import re

from sinkquant.artifacts import SinkMap
from sinkquant.errors import RequestError
from sinkquant.recipe import Prune

PLACE = re.compile(r"layers\.(\d+)(\.|$)")


def blocks_to_drop(settings: Prune, blocks: int) -> int:
    """The number of blocks that `prune.blocks` asks for, of so many.

    Raises:
        RequestError: it is none, or none would be left.
    """
    asked = settings.blocks
    if asked is None:
        return 0
    count = asked if isinstance(asked, int) else round(asked * blocks)
    if count < 1:
        raise RequestError(f"prune.blocks {asked} takes none of {blocks} blocks; ask for at least {1 / blocks:.2f}, or "
                           "for a number of blocks.")
    if count >= blocks:
        share = "" if isinstance(asked, int) else f" is {count} of {blocks} blocks and"
        raise RequestError(f"prune.blocks {asked}{share} leaves none of the model's {blocks} blocks; drop at most "
                           f"{blocks - 1}.")
    return count


def massive_blocks(sink_map: SinkMap) -> tuple[int | None, int | None]:
    """The blocks in which massive activations emerge and end; None where there are none, or where they come from the
    embedding or never end. Both are of the largest massive channel where the norms of tokens do not tell."""
    if not sink_map.channels:
        return None, None
    largest = max(sink_map.channels, key=lambda channel: channel.peak)
    emergence = sink_map.emergence.block if sink_map.emergence is not None else block_at(largest.born)
    return emergence, block_at(largest.ended)


def require_enough(count: int, blocks: int, held: dict[int, str], settings: Prune) -> None:
    """Refuse to drop more blocks than those that hold no massive activation up.

    Args:
        held: block -> what it does for massive activations ("emerge", "end").
    """
    if count > blocks - len(held):
        named = " and ".join(f"block {block} (massive activations {what} in it)"
                             for block, what in sorted(held.items()))
        also = "" if settings.block_score == "divergence" else " and prune.block_score=divergence"
        raise RequestError(f"prune.blocks drops {count} of {blocks} blocks, but {named} stay; drop at most "
                           f"{blocks - len(held)}, or set prune.massive=true{also}.")


def block_at(place: str | None) -> int | None:
    """"layers.3.mlp" -> 3; None for the embedding, and for no place."""
    found = None if place is None else PLACE.match(place)
    return None if found is None else int(found[1])
