"""Pruning -> zeros: the method that a plan names, on one matrix."""

from __future__ import annotations

import torch

from sinkquant.artifacts.pruning import Pruning
from sinkquant.errors import RequestError
from sinkquant.quantize.factor import damped_hessian
from sinkquant.quantize.pruning.masks import Pruned, magnitude, wanda
from sinkquant.quantize.pruning.refine import refine
from sinkquant.quantize.pruning.sparsegpt import sparsegpt


def prune(weight: torch.Tensor, decision: Pruning, hessian: torch.Tensor | None, damping: float, passes: int,
          name: str) -> Pruned:
    """Prune one matrix.

    Args:
        weight: float [rows, columns]. hessian: [columns, columns], of its input; None where none was taken.
        passes: rounds of coordinate descent after SparseGPT.

    Raises:
        RequestError: the method needs a Hessian, and no token reached the module.
        SinkquantError: the Hessian cannot be inverted.
    """
    if decision.method == "magnitude":
        return magnitude(weight, decision.sparsity, decision.group)
    if hessian is None:
        raise RequestError(f"no calibration token reached {name}; give more text, name it in prune.ignore, or prune by "
                           "magnitude.")
    if decision.method == "wanda":
        return wanda(weight, hessian.diagonal(), decision.sparsity, decision.group)
    pruned = sparsegpt(weight, hessian, decision.sparsity, decision.group, damping, name)
    return refine(pruned, weight, damped_hessian(hessian, damping, name)[0], passes) if passes else pruned


def check_pruning(name: str, decision: Pruning, columns: int | None) -> None:
    """Refuse pruning that does not fit a module of so many columns, None where there is no such module.

    Raises:
        RequestError: there is no such linear, or whole groups of the pattern do not make up its columns.
    """
    if columns is None:
        raise RequestError(f"the plan prunes {name}, which is no linear of this model; make a plan for it.")
    if decision.group is not None and columns % decision.group[1]:
        raise RequestError(f"the pattern {decision.pattern} does not divide the {columns} input columns of {name}.")
