"""Textbook quantizers in float64, column by column, with no trick of the package's own."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray


def scale_of(group: Array, bits: int, dtype: torch.dtype) -> Array:
    """[rows] float64: 2 max|w| / (2^bits - 1), stored in 16 bits."""
    info = torch.finfo(dtype)
    exact = np.abs(group.astype(np.float32)).max(1) / np.float32((2**bits - 1) / 2)
    exact = np.where(exact == 0, np.finfo(np.float32).eps, exact)
    smallest = max(info.tiny * info.eps, 2.0**-126)
    return torch.tensor(np.clip(exact, smallest, info.max / 2 ** (bits - 1)), dtype=torch.float32).to(
        dtype).double().numpy()


def nearest(column: Array, scale: Array, bits: int) -> Array:
    return np.clip(np.round(column / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def rtn(weight: Array, bits: int, group: int, dtype: torch.dtype) -> tuple[Array, Array]:
    """codes [rows, columns], scales [rows, groups]."""
    rows, columns = weight.shape
    size = columns if group == -1 else group
    codes, scales = np.empty((rows, columns)), np.empty((rows, columns // size))
    for g in range(columns // size):
        part = slice(g * size, (g + 1) * size)
        scales[:, g] = scale_of(weight[:, part], bits, dtype)
        codes[:, part] = nearest(weight[:, part].astype(np.float32), scales[:, g:g + 1].astype(np.float32), bits)
    return codes, scales


def visiting_order(diagonal: Array, size: int, act_order: bool) -> list[int]:
    """Whole groups by their share of the diagonal, largest first, and the columns inside a group likewise."""
    groups = [list(range(start, start + size)) for start in range(0, len(diagonal), size)]
    if act_order:
        groups = [sorted(group, key=lambda c: -diagonal[c]) for group in groups]
        groups.sort(key=lambda group: -sum(diagonal[c] for c in group))
    return [column for group in groups for column in group]


def gptq(weight: Array, hessian: Array, bits: int, group: int, damping: float, act_order: bool,
         dtype: torch.dtype) -> tuple[Array, Array]:
    """Optimal Brain Quantization in a fixed order: after every column the inverse Hessian of the columns that are
    left is formed anew, by elimination, and no factorization is used.

    Returns:
        codes [rows, columns], scales [rows, groups].
    """
    rows, columns = weight.shape
    size = columns if group == -1 else group
    order = visiting_order(np.diag(hessian), size, act_order)
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(columns))
    work = weight.astype(np.float64).copy()
    codes, scales = np.empty((rows, columns)), np.empty((rows, columns // size))
    for place, column in enumerate(order):
        g = column // size
        if place % size == 0:
            scales[:, g] = scale_of(work[:, g * size:(g + 1) * size], bits, dtype)
        codes[:, column] = nearest(work[:, column], scales[:, g], bits)
        error = (work[:, column] - codes[:, column] * scales[:, g]) / inverse[column, column]
        later = order[place + 1:]
        work[:, later] -= np.outer(error, inverse[column, later])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, scales


def loss(weight: Array, codes: Array, scales: Array, hessian: Array) -> float:
    """trace(dW H dW^T)."""
    difference = weight - codes * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
    return float(np.einsum("ri,ij,rj->", difference, hessian, difference))
