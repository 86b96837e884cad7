"""A model without the blocks that it can do without."""

from sinkquant.blocks.choose import choose_blocks, require_droppable
from sinkquant.blocks.cut import cut_blocks, drop_blocks
