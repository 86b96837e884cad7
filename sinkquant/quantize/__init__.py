"""Plan -> weights."""

from sinkquant.quantize.apply import quantize, quantized_blocks
from sinkquant.quantize.block import QuantizedBlock
from sinkquant.quantize.check import check
from sinkquant.quantize.end_to_end import TuningStart, distilled, teacher_targets
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.state import UNPACKED, QuantizedState, is_quantized, state_of
from sinkquant.schemes.codecs.grid import to_integers
from sinkquant.schemes.codecs.outliers import Outliers
from sinkquant.schemes.codecs.packed import PackedWeight, row_chunks
