"""Ranks and neuron partitions as candidates of one exact knapsack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradrank.allocation.gains import SOLVERS, allocate_gains
from gradrank.allocation.table import Candidate
from gradrank.core.errors import MeasurementError, OptionError
from gradrank.core.partition import Capacity, NeuronPartition
from gradrank.core.targets import Target

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowSplit:
    """One way to split a target's output rows, with what each further rank of a group gains.

    Attributes:
        bits: The dominant rows: bit i is set if row i is dominant.
        upper: Gain of rank 1, 2, ... on the dominant rows; 0 or more.
        lower: Gain of rank 1, 2, ... on the other rows; 0 or more.
    """

    bits: int
    upper: Sequence[float]
    lower: Sequence[float]


def allocate_capacities(
    targets: Sequence[Target],
    gains: Mapping[str, Sequence[float]],
    splits: Mapping[str, Sequence[RowSplit]],
    budget: int,
    *,
    r_min: int = 0,
    r_max: int | None = None,
    solver: str = "exact",
) -> dict[str, Capacity]:
    """Return the ranks and neuron partitions with the largest total gain within the budget.

    Candidates of a target are all its ranks and, for each split, all pairs ``r > r'`` of ranks of
    its two groups.

    Args:
        targets: The targets.
        gains: Per target name, the gain of each further rank on all rows, as in
            :func:`~gradrank.allocation.gains.allocate_gains`.
        splits: Ways to split the rows, per target name; a target without any gets a rank.
        budget: Budget in parameters.
        r_min: Smallest rank of every row.
        r_max: Largest rank of the stock LoRA that holds a target, ``r + r'`` for a partition.
            None: as many ranks for each group as it has directions with a gain.
        solver: ``exact`` or ``greedy``.

    Returns:
        Capacity per target name, in the order of ``targets``: a rank, or a partition of two
        groups. The parameters never exceed the budget, and the slack is smaller than what any
        candidate that gains more would add to the cost of its target.

    Raises:
        MeasurementError: If a gain is negative or not finite.
        OptionError: If there are splits for no target, or one does not split its rows.

    Notes:
        Without splits the ranks are those of ``allocate_gains``. Gains that agree to ``2**-56`` of
        their total count as ties.
    """
    ranks = allocate_gains(targets, gains, budget, r_min=r_min, r_max=r_max, solver=solver)
    unknown = sorted(set(splits) - set(ranks))
    if unknown:
        raise OptionError(f"there are splits for '{unknown[0]}', which is no target.")
    if not any(splits.values()):
        return dict(ranks)
    groups = {
        target.name: candidates(
            target, gains[target.name], splits.get(target.name, ()), r_min=r_min, r_max=r_max
        )
        for target in targets
    }
    chosen = SOLVERS[solver](groups, budget)
    by_rank = {t.name: _of_rank(t, gains[t.name], ranks[t.name]) for t in targets}
    # Never the case with the exact solver; the greedy one may do better with fewer candidates.
    if sum(c.gain for c in by_rank.values()) > sum(c.gain for c in chosen.values()):
        chosen = by_rank
    _spend_rest(groups, chosen, budget)
    return {name: candidate.capacity for name, candidate in chosen.items()}


def candidates(
    target: Target,
    gains: Sequence[float],
    splits: Sequence[RowSplit],
    *,
    r_min: int = 0,
    r_max: int | None = None,
) -> list[Candidate]:
    """Return what a target may get: of all ranks and partitions those that none beats.

    Args:
        target: The target.
        gains: Gain of each further rank on all rows.
        splits: Ways to split its rows.
        r_min: Smallest rank of every row, clipped to the target's ``max_rank``.
        r_max: Largest LoRA rank, ``r + r'`` for a partition.

    Returns:
        Candidates of rising cost and rising gain. Of equals in both a rank comes before a
        partition, and splits come in the order given.

    Examples:
        >>> split = RowSplit(0b0011, upper=[9.0, 1.0], lower=[0.0, 0.0])
        >>> [(c.cost, c.gain) for c in candidates(Target("a", 2, 4), [9.0, 1.0], [split])]
        [(0, 0.0), (4, 9.0), (8, 10.0)]
    """
    low = min(r_min, target.max_rank)
    most = min(target.max_rank, target.max_rank if r_max is None else r_max)
    whole = _totals(gains, target)
    ranks = np.arange(low, max(low, min(most, _last_rise(whole))) + 1)
    cost, gain = [ranks * target.cost], [whole[np.minimum(ranks, whole.size - 1)]]
    pairs = [np.stack([ranks, np.full_like(ranks, -1)], axis=1)]
    for split in splits:
        _check_split(split, target)
        upper, lower = _totals(split.upper, target), _totals(split.lower, target)
        both = _pairs(upper.size - 1, lower.size - 1, low, most, r_max)
        rows = split.bits.bit_count()
        prices = np.array([target.d_in + rows, target.d_in + target.d_out - rows])
        cost.append(both @ prices)
        gain.append(upper[both[:, 0]] + lower[both[:, 1]])
        pairs.append(both)
    source = np.repeat(np.arange(len(pairs)) - 1, [len(pair) for pair in pairs])
    costs, totals, both = np.concatenate(cost), np.concatenate(gain), np.concatenate(pairs)
    return [
        Candidate(
            _capacity(target, splits, int(source[i]), both[i].tolist()),
            int(costs[i]),
            float(totals[i]),
        )
        for i in _unbeaten(costs, totals)
    ]


def _totals(steps: Sequence[float], target: Target) -> Floats:
    """Return the gain of rank 0, 1, 2, ..., checked."""
    values = np.asarray(steps, dtype=np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise MeasurementError(
            f"target '{target.name}' has a group of rows with a gain that is negative or not "
            "finite. Measure again, or look at this target's gradients."
        )
    return np.concatenate(([0.0], np.cumsum(values)))


def _last_rise(totals: Floats) -> int:
    """Return the largest rank that gains something over the one before."""
    rises = np.flatnonzero(np.diff(totals))
    return int(rises[-1]) + 1 if rises.size else 0


def _pairs(upper: int, lower: int, low: int, most: int, r_max: int | None) -> NDArray[np.int64]:
    """Return all ``(r, r')`` with ``low <= r' < r`` within the bounds, ``[p, 2]``."""
    r, s = np.meshgrid(
        np.arange(1, min(upper, most) + 1), np.arange(low, min(lower, most) + 1), indexing="ij"
    )
    legal = s < r
    if r_max is not None:
        legal &= r + s <= r_max
    return np.stack([r[legal], s[legal]], axis=1)


def _unbeaten(cost: NDArray[np.int64], gain: Floats) -> list[int]:
    """Return the places that no cheaper or equally cheap candidate equals or beats."""
    order = np.lexsort((-gain, cost))
    ordered = gain[order]
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(ordered)[:-1]))
    return order[ordered > best_before].tolist()


def _capacity(
    target: Target, splits: Sequence[RowSplit], source: int, pair: Sequence[int]
) -> Capacity:
    if source < 0:
        return int(pair[0])
    return NeuronPartition(target.d_out, int(pair[0]), int(pair[1]), splits[source].bits)


def _check_split(split: RowSplit, target: Target) -> None:
    rows = split.bits.bit_count()
    if split.bits < 0 or split.bits.bit_length() > target.d_out or not 0 < rows < target.d_out:
        raise OptionError(
            f"a split of target '{target.name}' makes {rows} of {target.d_out} rows dominant; both "
            "groups need rows."
        )


def _of_rank(target: Target, gains: Sequence[float], rank: int) -> Candidate:
    return Candidate(rank, rank * target.cost, float(sum(gains[:rank])))


def _spend_rest(
    groups: Mapping[str, Sequence[Candidate]], chosen: dict[str, Candidate], budget: int
) -> None:
    """Take gains too small for the solver's fixed point, largest first; changes ``chosen``."""
    slack = budget - sum(candidate.cost for candidate in chosen.values())
    while True:
        moves = [
            (-(other.gain - held.gain), other.cost - held.cost, name, other)
            for name, held in chosen.items()
            for other in groups[name]
            if other.gain > held.gain and other.cost - held.cost <= slack
        ]
        if not moves:
            return
        _, cost, name, other = min(moves, key=lambda move: move[:3])
        chosen[name] = other
        slack -= cost
