"""Candidate tables: what the exact solver and the greedy fallback both read.

Gains become whole numbers in fixed point, so that all later sums and comparisons are exact and
ties are ties; costs become multiples of their greatest common divisor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradrank.core.errors import BudgetError, OptionError

GAIN_BITS = 57
DROPPED = -(2**60)
_MAX_COST = 2**40


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice for one group: what it is, what it costs, what it brings.

    Attributes:
        capacity: What is chosen, for example an integer rank.
        cost: Cost in parameters, 0 or more.
        gain: Gain in any unit, finite; only sums and differences matter.
    """

    capacity: Any
    cost: int
    gain: float


@dataclass(frozen=True)
class Table:
    """All candidates of all groups, one row per group in the order of names.

    Rows are sorted by cost. Costs and gains count from the row's cheapest candidate (column 0),
    which is always kept. Dropped places hold the gain ``DROPPED``: padding, candidates above the
    budget, and candidates that a cheaper or equally cheap one of the same row equals or beats.

    Attributes:
        names: Group names, sorted, ``[n]``.
        position: Place of the candidate in its group, ``[n, k]``.
        cost: Cost above the cheapest, in units of ``unit``, ``[n, k]``.
        gain: Gain above the cheapest, in units of ``quantum``, ``[n, k]``.
        budget: What may be spent beyond the cheapest candidates, in units of ``unit``.
        unit: Greatest common divisor of the cost differences, in parameters.
        quantum: Gain of one fixed-point step (a power of two).
        base_gain: Sum of the gains of the cheapest candidates, in ``quantum``.
    """

    names: tuple[str, ...]
    position: NDArray[np.int64]
    cost: NDArray[np.int64]
    gain: NDArray[np.int64]
    budget: int
    unit: int
    quantum: float
    base_gain: int

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Places that hold a candidate, ``[n, k]``."""
        return self.gain > DROPPED

    def pick(
        self, groups: Mapping[str, Sequence[Candidate]], columns: NDArray[np.int64]
    ) -> dict[str, Candidate]:
        """Return the candidates that stand in the chosen columns.

        Args:
            groups: The groups that the table was built from.
            columns: Chosen column per row, ``[n]``.

        Returns:
            Candidate per group name, in the order of ``groups``.
        """
        places = self.position[np.arange(len(self.names)), columns].tolist()
        chosen = dict(zip(self.names, places, strict=True))
        return {name: groups[name][chosen[name]] for name in groups}


def build_table(groups: Mapping[str, Sequence[Candidate]], budget: int) -> Table:
    """Build the table of a multiple-choice knapsack.

    Args:
        groups: Candidates per group name; at least one group, none empty.
        budget: Budget in parameters.

    Returns:
        The table.

    Raises:
        OptionError: If there is no group, a group is empty, a cost is no whole number in
            ``[0, 2**40]``, or a gain is not finite.
        BudgetError: If the cheapest candidates together cost more than the budget.

    **Notes**: gains are rounded to multiples of ``quantum``, at most ``2**-56`` of the sum of the
    groups' largest absolute gains; finer differences count as ties.
    """
    names = tuple(sorted(groups))
    sizes = np.array([len(groups[name]) for name in names], dtype=np.int64)
    if not names or not sizes.all():
        empty = [name for name in names if not len(groups[name])]
        what = f"group '{empty[0]}' has no candidate" if empty else "no group was given"
        raise OptionError(f"{what}; a knapsack picks one candidate in each of its groups.")
    row = np.repeat(np.arange(len(names)), sizes)
    column = np.arange(row.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    cost, real_gain = _read(groups, names)
    quantum = _quantum(real_gain, row, len(names))
    gain = np.rint(real_gain / quantum).astype(np.int64)
    order = np.lexsort((column, -gain, cost, row))
    shape = (len(names), int(sizes.max()))
    position, costs = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    gains = np.full(shape, DROPPED, np.int64)
    position[row, column], costs[row, column] = column[order], cost[order]
    gains[row, column] = gain[order]
    floor, base_gain = int(costs[:, 0].sum()), int(gains[:, 0].sum())
    if floor > budget:
        raise BudgetError(
            f"budget {budget:,} is below the floor of {floor:,} parameters, the cheapest "
            f"candidates of {len(names)} groups together. Raise the budget, or offer a cheaper "
            "candidate (rank 0 drops a target)."
        )
    padding = gains == DROPPED
    costs, gains = costs - costs[:, :1], gains - gains[:, :1]
    best_before = np.maximum.accumulate(gains, axis=1)[:, :-1]
    dropped = padding | (costs > budget - floor)
    dropped[:, 1:] |= gains[:, 1:] <= best_before
    unit = int(np.gcd.reduce(costs[~dropped])) or 1
    costs[dropped], gains[dropped] = 0, DROPPED
    return Table(
        names=names,
        position=position,
        cost=costs // unit,
        gain=gains,
        budget=min((budget - floor) // unit, int(costs.max(axis=1).sum()) // unit),
        unit=unit,
        quantum=quantum,
        base_gain=base_gain,
    )


def _read(
    groups: Mapping[str, Sequence[Candidate]], names: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return costs and gains of all candidates, group after group, checked."""
    candidates = list(chain.from_iterable(groups[name] for name in names))
    cost = np.array([candidate.cost for candidate in candidates])
    gain = np.array([candidate.gain for candidate in candidates], dtype=np.float64)
    if cost.dtype.kind not in "iu" or cost.min() < 0 or cost.max() > _MAX_COST:
        raise OptionError("a candidate's cost must be a whole number of parameters, 0 to 2**40.")
    if not np.isfinite(gain).all():
        bad = candidates[int(np.flatnonzero(~np.isfinite(gain))[0])]
        raise OptionError(
            f"a candidate of capacity {bad.capacity!r} and cost {bad.cost:,} has the gain "
            f"{bad.gain}; gains must be finite numbers. Check the measurement behind them."
        )
    return cost.astype(np.int64), gain


def _quantum(gain: NDArray[np.float64], row: NDArray[np.int64], n: int) -> float:
    """Return the power of two for which no sum over groups leaves ``2**GAIN_BITS``."""
    largest = np.zeros(n)
    np.maximum.at(largest, row, np.abs(gain))
    top = float(largest.max())
    if top == 0:
        return 1.0
    # Summed relative to the top, so that gains near the largest float do not overflow.
    exponent = math.frexp(top)[1] + math.frexp(float((largest / top).sum()))[1]
    return math.ldexp(1.0, max(exponent - GAIN_BITS, -1022))
