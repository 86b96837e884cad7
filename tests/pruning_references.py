"""Textbook pruning in float64, weight by weight, with no trick of the package's own."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Group = tuple[int, int] | None


def smallest(scores: Array, count: int) -> Array:
    """The places of the `count` smallest of a row of scores."""
    return np.argsort(scores, kind="stable")[:count]


def magnitude(weight: Array, sparsity: float, group: Group) -> Array:
    """The smallest weights of the matrix, or of every group."""
    if group is None:
        new = weight.flatten()
        new[smallest(np.abs(new), int(sparsity * new.size))] = 0
        return new.reshape(weight.shape)
    return by_row(weight, np.abs(weight), sparsity, group)


def wanda(weight: Array, energy: Array, sparsity: float, group: Group) -> Array:
    """|W_ij| ||X_j||_2, the smallest of every row or group (2306.11695, algorithm 1)."""
    return by_row(weight, np.abs(weight) * np.sqrt(energy), sparsity, group)


def by_row(weight: Array, scores: Array, sparsity: float, group: Group) -> Array:
    new = weight.copy()
    for row, score in zip(new, scores, strict=True):
        if group is None:
            row[smallest(score, int(sparsity * row.size))] = 0
        else:
            for start in range(0, row.size, group[1]):
                row[start + smallest(score[start:start + group[1]], group[1] - group[0])] = 0
    return new


def sparsegpt(weight: Array, hessian: Array, sparsity: float, group: Group, damping: float, block: int = 128) -> Array:
    """Optimal Brain Surgeon from left to right: for every column the inverse Hessian of the columns that are left is
    formed anew, and no factorization is used. Without a pattern the zeros of a block are chosen when it begins."""
    rows, columns = weight.shape
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(columns)
    work, zeros = weight.astype(np.float64).copy(), np.zeros((rows, columns), dtype=bool)
    # What a zero in column c costs: w^2 over the corner of the inverse of what is left there.
    corner = np.array([np.linalg.inv(damped[c:, c:])[0, 0] for c in range(columns)])
    for c in range(columns):
        if group is None and c % block == 0:
            stop = min(c + block, columns)
            cost = (work[:, c:stop] ** 2 / corner[c:stop]).flatten()
            chosen = np.zeros(cost.size, dtype=bool)
            chosen[smallest(cost, int(sparsity * cost.size))] = True
            zeros[:, c:stop] = chosen.reshape(rows, stop - c)
        if group is not None and c % group[1] == 0:
            for row in range(rows):
                cost = work[row, c:c + group[1]] ** 2 / corner[c:c + group[1]]
                zeros[row, c + smallest(cost, group[1] - group[0])] = True
        inverse = np.linalg.inv(damped[c:, c:])
        error = np.where(zeros[:, c], work[:, c], 0.0)
        work[:, c:] -= np.outer(error / inverse[0, 0], inverse[0])
    return np.where(zeros, 0.0, work)
