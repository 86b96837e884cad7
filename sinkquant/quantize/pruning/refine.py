"""Coordinate descent over the weights that pruning leaves: the zeros stay, the others come nearer to the best for them.

SparseGPT goes over the columns once, from left to right, so that no column makes up for zeros to its right. Here all
other weights held fixed, the best value of a weight is known in closed form; QuantEase (2309.01885) has it for codes.
"""

from __future__ import annotations

import torch

from sinkquant.quantize.pruning.masks import Pruned

BLOCK = 128
CHUNK = 1 << 24
"""Weights that are worked on at a time."""


def refine(pruned: Pruned, weight: torch.Tensor, hessian: torch.Tensor, passes: int) -> Pruned:
    """Lower trace((P - W) H (P - W)^T) over the kept weights of P; every pass visits every column once.

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
