"""Plan -> weights."""

from sinkquant.quantize.apply import quantize
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.packed import PackedWeight
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.state import UNPACKED, QuantizedState, is_quantized, state_of

__all__ = ["GPTQ", "RTN", "UNPACKED", "PackedWeight", "QuantizedState", "is_quantized", "quantize", "state_of"]
