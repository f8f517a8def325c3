"""Slow, obviously right overlap of random sets: every pair of sets, in exact rational numbers."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product


def intersections(rows: int, first: int, second: int) -> list[int]:
    """Return ``|A ∩ B|`` for every pair of sets of two sizes."""
    return [
        len(set(a) & set(b))
        for a in combinations(range(rows), first)
        for b in combinations(range(rows), second)
    ]


def by_enumeration(
    targets: Sequence[tuple[int, int, int]],
) -> tuple[Fraction, Fraction, Fraction | None]:
    """Return mean and variance of the intersection, and the mean Jaccard index.

    Every pair of sets in every target is tried, all targets together; ``targets`` holds ``(rows,
    |A|, |B|)``. The Jaccard index is None if all sets are empty.
    """
    every = [intersections(*target) for target in targets]
    sums = [Fraction(sum(values)) for values in product(*every)]
    mean = sum(sums, Fraction(0)) / len(sums)
    variance = sum(((value - mean) ** 2 for value in sums), Fraction(0)) / len(sums)
    whole = sum(first + second for _, first, second in targets)
    if not whole:
        return mean, variance, None
    jaccard = sum((value / (whole - value) for value in sums), Fraction(0)) / len(sums)
    return mean, variance, jaccard


def broken_by_enumeration(
    targets: Sequence[tuple[int, int, int]],
) -> tuple[Fraction, Fraction, Fraction | None]:
    """Draw with replacement, as a binomial law would: the variance comes out too large."""
    mean, variance, jaccard = by_enumeration(targets)
    for rows, first, second in targets:
        share = Fraction(second, rows)
        variance += first * share * (1 - share)
        if rows > 1:
            free = Fraction((rows - first) * (rows - second) * first * second)
            variance -= free / (rows * rows * (rows - 1))
    return mean, variance, jaccard
