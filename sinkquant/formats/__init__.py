"""Checkpoints in and out."""

from typing import TYPE_CHECKING

from sinkquant.lazy import make_lazy

if TYPE_CHECKING:
    from sinkquant.formats.load import KV_PREFIX, bases_of, load, load_dense, open_quantized, prefix_of, read_checkpoint
    from sinkquant.formats.output import require_free
    from sinkquant.formats.save import STORED, save, versions, written_aside
    from sinkquant.formats.stream import dismiss, follow, quantize_to
    from sinkquant.schemes.codecs.reading import is_library, open_checkpoint, rounds_inputs

__all__ = ["KV_PREFIX", "STORED", "bases_of", "dismiss", "follow", "is_library", "load", "load_dense",
           "open_checkpoint", "open_quantized", "prefix_of", "quantize_to", "read_checkpoint", "require_free",
           "rounds_inputs", "save", "versions", "written_aside"]

make_lazy(__name__)
