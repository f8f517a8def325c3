"""Agreement of two rankings: Spearman's correlation with average ranks for ties."""

import math

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Return ranks 1..n in ascending order; equal values share their mean rank.

    Args:
        values: ``[n]``.

    Returns:
        ``[n]``, float64.

    Examples:
        >>> average_ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, inverse, counts = torch.unique(
        values.double(), sorted=True, return_inverse=True, return_counts=True
    )
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation, or NaN where it does not exist.

    Args:
        first: ``[n]``.
        second: ``[n]``.

    Returns:
        Correlation in [-1, 1]; NaN for fewer than two values or when either side is constant.

    Examples:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])), 9)
        1.0
    """
    if first.numel() < 2:
        return math.nan
    x, y = average_ranks(first), average_ranks(second)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else math.nan
