"""Checkpoints in and out."""

from sinkquant.formats.load import load, load_dense, read_checkpoint
from sinkquant.formats.save import require_free, save, versions, written_aside
from sinkquant.formats.stream import quantize_to

__all__ = ["load", "load_dense", "quantize_to", "read_checkpoint", "require_free", "save", "versions", "written_aside"]
