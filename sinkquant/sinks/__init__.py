"""Where the sinks of a model stand in tokens at hand: one rule for detection, statistics, diagnostics and the cache."""

from sinkquant.sinks.selector import Selects, SinkSelector
