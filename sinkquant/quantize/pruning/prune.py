"""Pruning -> zeros: the method that a plan names, on one matrix."""

from __future__ import annotations

import torch

from sinkquant.artifacts.pruning import Pruning
from sinkquant.errors import RequestError
from sinkquant.quantize.factor import damped_hessian
from sinkquant.quantize.pruning.masks import Pruned, magnitude, wanda
from sinkquant.quantize.pruning.sparsegpt import sparsegpt

BLOCK = 128
CHUNK = 1 << 24
"""Weights that are worked on at a time."""


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


def refine(pruned: Pruned, weight: torch.Tensor, hessian: torch.Tensor, passes: int) -> Pruned:
    """Coordinate descent over the weights that pruning leaves: the zeros stay, the others come nearer to the best for
    them. It lowers trace((P - W) H (P - W)^T); every pass visits every column once.

    SparseGPT goes over the columns once, from left to right, so that no column makes up for zeros to its right. Here
    all other weights held fixed, the best value of a weight is known in closed form; QuantEase (2309.01885) has it for
    codes.

    Args:
        weight: W, float [rows, columns]. hessian: [columns, columns], positive definite, so with its damping.
    """
    metric, refined = hessian.float(), pruned.weight.float().clone()
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        work, free = refined[rows], pruned.kept[rows]
        for _ in range(passes):
            slope = (work - weight[rows].float()) @ metric
            for columns in torch.arange(weight.shape[1], device=weight.device).split(BLOCK):
                # Within a block the slope is kept up to date; the other columns get its changes in one product.
                inner, local = metric[columns][:, columns], slope[:, columns]
                changes = torch.zeros_like(local)
                for i in range(len(columns)):
                    changes[:, i] = -local[:, i] / inner[i, i] * free[:, columns[i]]
                    local += changes[:, i:i + 1] * inner[i]
                work[:, columns] += changes
                slope += changes @ metric[columns]
    return Pruned(refined, pruned.kept)
