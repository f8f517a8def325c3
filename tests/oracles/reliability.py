"""Slow twin of the agreement of two rankings: mid-ranks by counting, Pearson by its formula."""

import math
from collections.abc import Sequence


def mid_ranks(values: Sequence[float]) -> list[float]:
    """One more than the number of smaller values, plus half the number of other equal ones."""
    return [
        1 + sum(other < value for other in values) + (values.count(value) - 1) / 2
        for value in values
    ]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    x, y = mid_ranks(list(first)), mid_ranks(list(second))
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    bottom = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return top / bottom if bottom else math.nan
