"""A model without its no-op heads."""

from sinkquant.heads.cut import cut_heads
