"""Heads that a plan takes out: the output projection stops reading them."""

from __future__ import annotations

import torch

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, weight_matrix
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.pruning.masks import Pruned


def silence(decoder: Decoder, plan: Plan, index: int) -> dict[str, torch.Tensor]:
    """Set the columns of a block's silenced heads to zero.

    Returns:
        output projection -> bool [columns], those that are zero now.
    """
    found: dict[str, torch.Tensor] = {}
    for head in plan.silenced_heads:
        if head.layer == index:
            weight = weight_matrix(decoder.linears[head.module])
            silent = found.setdefault(head.module, torch.zeros(weight.shape[1], dtype=torch.bool))
            silent[head.start:head.stop] = True
            weight[:, head.start:head.stop] = 0
    return found


def unheard(seen: Hessian, silent: torch.Tensor) -> None:
    """Take what silenced heads feed out of a Hessian: then nothing makes up for errors with their columns, and nothing
    has to make up for those."""
    silent = silent.to(seen.sum.device)
    for matrix in (seen.sum, seen.cross_sum):
        if matrix is not None:
            matrix[silent] = 0
            matrix[:, silent] = 0


def still_pruned(pruned: Pruned | None, weight: torch.Tensor, silent: torch.Tensor) -> Pruned:
    """What pruning has left of a weight, without the columns of silenced heads."""
    zeros = silent.to(weight.device).expand(weight.shape)
    if pruned is None:
        return Pruned(weight.masked_fill(zeros, 0), ~zeros)
    return Pruned(pruned.weight.masked_fill(zeros, 0), pruned.kept & ~zeros)


def check_heads(decoder: Decoder, plan: Plan) -> None:
    """Refuse silenced heads that a model does not have.

    Raises:
        RequestError: the module is no linear of the layer, or the columns lie outside it.
    """
    for head in plan.silenced_heads:
        module = decoder.linears.get(head.module)
        if module is None or decoder.block_of(head.module) != head.layer or not (
                0 <= head.start < head.stop <= weight_matrix(module).shape[1]):
            raise RequestError(f"the plan silences head {head.head} of layer {head.layer} in {head.module}, which this "
                               "model does not have; make a plan for it.")
