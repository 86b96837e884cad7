"""Blocks that a model can do without: what their absence costs, and which of them a plan drops."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Strict

BlockScore = Literal["divergence", "influence"]


class BlockCost(Strict):
    """A block, and what the model loses without it alone.

    `divergence`: mean over tokens of KL(whole || without the block) of the next token, nats; null where it was not
    measured. `sink_share`: the share of the divergence, summed over tokens, that stands at first positions and sinks.
    `influence`: 1 - the mean cosine of a token's state before and after the block (arXiv 2403.03853), a proxy.
    `massive`: what it has to do with massive activations, null for nothing.
    """

    block: int
    divergence: float | None
    sink_share: float | None
    influence: float
    massive: Literal["emerge", "end"] | None = None


class DroppedBlock(Strict):
    """A block that is dropped, in the order of the choice. `divergence` and `sink_share`: as of a cost, without this
    block and all before it in the list."""

    block: int
    divergence: float
    sink_share: float
    reason: str


class BlockPlan(Strict):
    """Which blocks of the whole model stay; all other numbers of blocks in a plan are those of the shorter model.

    `emergence` and `end`: the blocks in which massive activations emerge and end, null where there are none. `rows` and
    `length`: what was measured on. `whole_bytes`: of the whole model's weights in its own dtype. `costs` are in the
    order of the blocks.
    """

    kept: list[int]
    dropped: list[DroppedBlock]
    emergence: int | None
    end: int | None
    score: BlockScore
    rows: int
    length: int
    whole_bytes: int
    costs: list[BlockCost] = Field(default_factory=list)

    def in_words(self) -> str:
        """What is dropped and what it costs, in a sentence."""
        blocks = ", ".join(str(one.block) for one in sorted(self.dropped, key=lambda one: one.block))
        last = self.dropped[-1]
        held = [f"massive activations {what} in block {block}{'' if block in self.kept else ', which is dropped'}"
                for what, block in (("emerge", self.emergence), ("end", self.end)) if block is not None]
        return (f"{len(self.dropped)} of {len(self.dropped) + len(self.kept)} blocks are dropped ({blocks}): without "
                f"them the 16-bit model diverges by {last.divergence:.3g} nats per token on the calibration text, "
                f"{last.sink_share:.0%} of it at first positions and sinks{'; ' if held else ''}{'; '.join(held)}")
