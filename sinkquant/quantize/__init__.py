"""Plan -> weights."""

from sinkquant.quantize.apply import QuantizedBlock, check, quantize, quantized_blocks
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.packed import PackedWeight, row_chunks
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.state import UNPACKED, QuantizedState, is_quantized, state_of

__all__ = ["GPTQ", "RTN", "UNPACKED", "PackedWeight", "QuantizedBlock", "QuantizedState", "check", "is_quantized",
           "quantize", "quantized_blocks", "row_chunks", "state_of"]
