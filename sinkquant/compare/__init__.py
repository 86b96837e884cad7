"""Any number of checkpoints beside one unquantized model: sizes, divergence, perplexity, sinks, in one table."""

from sinkquant.compare.compare import compare
