"""Setting weights to zero: which ones, and what the others do to make up for it."""

from sinkquant.quantize.pruning.heads import check_heads, silence, still_pruned, unheard
from sinkquant.quantize.pruning.masks import Pruned, magnitude, wanda
from sinkquant.quantize.pruning.prune import check_pruning, prune
from sinkquant.quantize.pruning.sparsegpt import sparsegpt
