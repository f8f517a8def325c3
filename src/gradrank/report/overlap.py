"""Overlap of neuron partitions: how many dominant neurons two runs share, and what chance gives."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradrank.core.partition import NeuronPartition

# Standard deviations from which on an overlap counts as more, or less, than chance.
CLEAR = 3.0


@dataclass(frozen=True, slots=True)
class Overlap:
    """The overlap of two sets of dominant neurons, summed over targets.

    Attributes:
        targets: Targets that both runs split.
        rows: Output neurons of those targets.
        first: Dominant neurons of the first run, ``|A|``.
        second: Dominant neurons of the second run, ``|B|``.
        shared: Neurons that are dominant in both, ``|A ∩ B|``.
        expected: What ``shared`` is on average for random sets of the same sizes in each target.
        variance: Its variance for such sets.
    """

    targets: int
    rows: int
    first: int
    second: int
    shared: int
    expected: float
    variance: float

    @property
    def jaccard(self) -> float | None:
        """``|A ∩ B| / |A ∪ B|``; None if both sets are empty."""
        union = self.first + self.second - self.shared
        return self.shared / union if union else None

    @property
    def chance(self) -> float | None:
        """What the Jaccard index is on average for such random sets; None if both are empty.

        The mean and the variance of the intersection are exact; of the ratio the expansion around
        the mean is taken up to second order, ``f(μ) + f''(μ) σ² / 2`` with ``f(x) = x / (s - x)``
        and ``s = |A| + |B|``. The terms that are left out shrink with the square of the number
        of neurons.
        """
        whole = self.first + self.second
        if not whole:
            return None
        left = whole - self.expected
        return self.expected / left + self.variance * whole / left**3

    @property
    def z(self) -> float | None:
        """Standard deviations between ``shared`` and chance; None where chance leaves no choice."""
        if self.variance <= 0:
            return None
        return (self.shared - self.expected) / math.sqrt(self.variance)

    @property
    def verdict(self) -> str:
        """``more than chance``, ``less than chance``, ``like chance`` or ``nothing to compare``."""
        if self.z is None:
            return "nothing to compare"
        if abs(self.z) < CLEAR:
            return "like chance"
        return "more than chance" if self.z > 0 else "less than chance"


def overlap(
    first: Mapping[str, NeuronPartition],
    second: Mapping[str, NeuronPartition],
    names: Iterable[str] | None = None,
) -> Overlap:
    """Count the dominant neurons that two runs share.

    In each target the sizes of both sets are taken as given: the share of dominant neurons says
    nothing about which they are. If both were drawn at random, the intersection would follow a
    hypergeometric law of mean ``|A||B|/m``; targets are taken as independent, so that means and
    variances add up.

    Args:
        first: Partition by target of one run.
        second: Partition by target of the other.
        names: Only these targets; None: all.

    Returns:
        The overlap over the targets that both have, with the same number of rows.

    Examples:
        >>> a = {"q": NeuronPartition.of([True, True, False, False], 8, 1)}
        >>> b = {"q": NeuronPartition.of([True, False, True, False], 8, 1)}
        >>> found = overlap(a, b)
        >>> found.shared, found.expected, found.jaccard
        (1, 1.0, 0.3333333333333333)
    """
    rows = sizes_a = sizes_b = shared = targets = 0
    means, variances = [], []
    for name in first if names is None else names:
        a, b = first.get(name), second.get(name)
        if a is None or b is None or a.d_out != b.d_out:
            continue
        m, size_a, size_b = a.d_out, a.dominant_rows, b.dominant_rows
        targets, rows = targets + 1, rows + m
        sizes_a, sizes_b = sizes_a + size_a, sizes_b + size_b
        shared += (a.bits & b.bits).bit_count()
        means.append(size_a * size_b / m)
        if m > 1:
            free = (m - size_a) * (m - size_b)
            variances.append(size_a * size_b * free / (m * m * (m - 1)))
    return Overlap(targets, rows, sizes_a, sizes_b, shared, math.fsum(means), math.fsum(variances))
