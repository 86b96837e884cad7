"""Model + text + sink map -> Sensitivity: what each linear costs in each format, through sinks and through others."""

from sinkquant.sensitivity.find import find_sensitivity, sink_places
