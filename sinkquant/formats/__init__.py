"""Checkpoints in and out."""

from typing import TYPE_CHECKING

from sinkquant.lazy import make_lazy

if TYPE_CHECKING:
    from sinkquant.formats.load import (
        KV_PREFIX,
        bases_of,
        load,
        load_dense,
        open_any,
        open_quantized,
        prefix_of,
        read_checkpoint,
    )
    from sinkquant.formats.output import require_free
    from sinkquant.formats.save import STORED, save, versions, written_aside
    from sinkquant.formats.stream import dismiss, follow, quantize_to
    from sinkquant.schemes.codecs.reading import is_library, open_checkpoint, rounds_inputs

make_lazy(__name__)
