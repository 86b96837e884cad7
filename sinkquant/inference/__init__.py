"""Computing with weights that stay packed in memory, by torch's kernels."""

from sinkquant.inference.ends import RoundedEmbedding, packed_embedding, round_ends
from sinkquant.inference.kernels import Int4, Kernel, int4_on, kernel_for
from sinkquant.inference.linear import KernelLinear
from sinkquant.inference.pages import to_large_pages
from sinkquant.inference.summary import PACKING, Packing, packing
