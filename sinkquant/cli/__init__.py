"""quantize-model: commands, and the tables that they print."""

from sinkquant.cli.entry import app, main
