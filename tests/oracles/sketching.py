"""Slow twins of the sketches: the fold as an explicit matrix, and an honest interval."""

import math

import torch
from torch import Tensor


def fold_matrix(signs: Tensor, size: int) -> Tensor:
    """``[d, k]``: row j holds its sign in column ``j mod k``; the identity where d <= k."""
    width = signs.numel()
    if width <= size:
        return torch.eye(width, dtype=torch.float64)
    matrix = torch.zeros(width, size, dtype=torch.float64)
    for j in range(width):
        matrix[j, j % size] = float(signs[j])
    return matrix


def standard_errors_away(samples: Tensor, truth: Tensor) -> Tensor:
    """How many standard errors the mean over seeds (first axis) lies from the truth."""
    count = samples.shape[0]
    error = samples.double().std(dim=0) / math.sqrt(count)
    return (samples.double().mean(dim=0) - truth.double()).abs() / error.clamp_min(1e-300)


def leading_energy(matrix: Tensor, directions: int) -> Tensor:
    """The leading squared singular values, from the full matrix."""
    return torch.linalg.svdvals(matrix.double())[:directions].square()
