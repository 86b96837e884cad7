"""Plan -> weights."""

from sinkquant.quantize.apply import quantize, quantized_blocks
from sinkquant.quantize.backend import BackendWeight, Codec, codec, packages_of, require_packages, rounds_itself
from sinkquant.quantize.block import QuantizedBlock
from sinkquant.quantize.check import check
from sinkquant.quantize.end_to_end import TuningStart, distilled, teacher_targets
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.packed import PackedWeight, row_chunks
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.side import Side
from sinkquant.quantize.state import UNPACKED, QuantizedState, is_quantized, state_of

__all__ = ["GPTQ", "RTN", "UNPACKED", "BackendWeight", "Codec", "PackedWeight", "QuantizedBlock", "QuantizedState",
           "Side", "TuningStart", "check", "codec", "distilled", "is_quantized", "packages_of", "quantize",
           "quantized_blocks", "require_packages", "rounds_itself", "row_chunks", "state_of", "teacher_targets"]
