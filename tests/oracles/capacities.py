"""Slow twin of the knapsack over ranks and partitions: dense matrices, loops, every combination."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

Choice = tuple[Any, ...]
"""``("rank", k)``, or ``("rows", rows, r, r')``."""


def leading(matrix: Tensor, rank: int) -> float:
    """Energy of the leading directions, from the full matrix."""
    total = 0.0
    for place, value in enumerate(torch.linalg.svdvals(matrix.double()).tolist()):
        if place < rank:
            total += value * value
    return total


def gain(matrix: Tensor, choice: Choice) -> float:
    if choice[0] == "rank":
        return leading(matrix, choice[1])
    _, rows, r, s = choice
    others = [i for i in range(matrix.shape[0]) if i not in rows]
    return leading(matrix[list(rows)], r) + leading(matrix[others], s)


def cost(matrix: Tensor, choice: Choice) -> int:
    m, n = matrix.shape
    if choice[0] == "rank":
        return choice[1] * (n + m)
    _, rows, r, s = choice
    return r * (n + len(rows)) + s * (n + m - len(rows))


def choices(matrix: Tensor, sizes: Sequence[int], r_max: int | None = None) -> list[Choice]:
    """All ranks, and all pairs of ranks for the rows of most energy, for every size."""
    m, n = matrix.shape
    most = min(m, n)
    found: list[Choice] = [("rank", k) for k in range(most + 1) if r_max is None or k <= r_max]
    energies = [float(row.double() @ row.double()) for row in matrix]
    order = sorted(range(m), key=lambda i: (-energies[i], i))
    for size in sizes:
        if not 0 < size < m:
            continue
        rows = tuple(sorted(order[:size]))
        pairs = [(r, s) for r in range(1, most + 1) for s in range(r)]
        found.extend(("rows", rows, r, s) for r, s in pairs if r_max is None or r + s <= r_max)
    return found


def best(
    matrices: Mapping[str, Tensor], options: Mapping[str, Sequence[Choice]], budget: int
) -> tuple[float, dict[str, Choice]]:
    """Try every combination of one choice per matrix."""
    names = list(matrices)
    priced = [
        [(gain(matrices[name], c), cost(matrices[name], c), c) for c in options[name]]
        for name in names
    ]
    top, kept = -1.0, {}
    for combination in product(*priced):
        if sum(item[1] for item in combination) <= budget:
            total = sum(item[0] for item in combination)
            if total > top:
                top, kept = total, {n: i[2] for n, i in zip(names, combination, strict=True)}
    return top, kept
