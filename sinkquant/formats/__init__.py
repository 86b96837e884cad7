"""Checkpoints in and out."""

from sinkquant.formats.load import KV_PREFIX, load, load_dense, open_quantized, prefix_of, read_checkpoint
from sinkquant.formats.save import require_free, save, versions, written_aside
from sinkquant.formats.stream import dismiss, follow, quantize_to

__all__ = ["KV_PREFIX", "dismiss", "follow", "load", "load_dense", "open_quantized", "prefix_of", "quantize_to",
           "read_checkpoint", "require_free", "save", "versions", "written_aside"]
