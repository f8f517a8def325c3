"""GARD's proportional rule: ranks in proportion to scores, under a parameter budget."""

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gradrank.allocation.problem import (
    check_budget,
    narrow,
    rank_bounds,
    rank_costs,
    refuse_empty,
    score_array,
)
from gradrank.core.targets import Target

_TIE = 1e-10

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def proportional(
    targets: Sequence[Target],
    scores: Mapping[str, float],
    budget: int,
    *,
    r_min: int = 0,
    r_max: int | None = None,
    spend_leftover: bool = True,
    within: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, int]:
    r"""Return ranks in proportion to scores.

    With real-valued ranks :math:`\tilde r_\ell = r_{min} + c\,s_\ell`, the integer ranks are
    :math:`\tilde r_\ell` rounded (halves up) and clipped to ``[r_min, r_max]``, for the largest
    ``c`` at which :math:`\sum_\ell r_\ell (d_{in} + d_{out})` is within the budget. What is left
    then goes, one rank at a time, to the target whose real-valued rank was cut most.

    Args:
        targets: The targets.
        scores: Score per target name, 0 or more; only their ratios matter.
        budget: Budget in parameters.
        r_min: Smallest rank, clipped to a target's ``max_rank``.
        r_max: Largest rank, clipped to a target's ``max_rank``; None means ``max_rank``.
        spend_leftover: Whether to spend what the rule leaves; False is the paper's rule alone.
        within: Smallest and largest rank per target name on top of ``r_min`` and ``r_max``, for
            ranks that may only move a little. A budget above what these allow is not spent.

    Returns:
        Rank per target name, in the order of ``targets``. The parameters never exceed the
        budget; with ``spend_leftover`` the slack is smaller than one rank on any target that has
        a positive score and a rank below ``r_max``. A target with score 0 gets ``r_min``.

    Raises:
        BudgetError: If the budget is below the floor or above the ceiling, or if the paper's
            rule alone rounds every rank to 0.
        MeasurementError: If a score is negative or not finite, or all are zero.
        OptionError: If names or bounds are wrong.
        TargetError: If there is no target, or one is listed twice.

    **Source**: GARD, section 3.3. Differs: the paper searches ``c`` to a tolerance on the budget;
    here it is exact and the budget is never exceeded. Spending the leftover is ours.

    **Notes**: a rank jumps up where ``c s`` reaches a half. Jumps within a relative 1e-10 of the
    first one that does not fit count as simultaneous, so that scaling all scores by a common
    factor cannot break a tie by rounding. Ties in the leftover go to the larger score, then the
    cheaper target, then the first name.

    Examples:
        >>> layers = [Target("a", 4, 4), Target("b", 4, 4)]
        >>> proportional(layers, {"a": 3.0, "b": 1.0}, budget=32)
        {'a': 3, 'b': 1}
    """
    costs = rank_costs(targets)
    low, high = rank_bounds(targets, r_min, r_max)
    base = low
    score = score_array(targets, scores)
    if within is not None:
        low, high = narrow(targets, low, high, within)
        budget = min(budget, int((np.where(score > 0, high, low) * costs).sum()))
    check_budget(targets, low, high, budget, live=score > 0)
    # Relative to the largest, so that neither tiny nor huge scores leave the range of floats.
    share = score / score.max()
    factor = _largest_factor(share, costs, base, low, high, budget)
    ranks = _round(factor * (1 - _TIE), share, base, low, high)
    if spend_leftover:
        cut = base + factor * share - ranks
        slack = budget - int((ranks * costs).sum())
        high = np.where(score > 0, high, low)
        _spend_leftover(ranks, [t.name for t in targets], cut, score, costs, high, slack)
    named = dict(zip((target.name for target in targets), ranks.tolist(), strict=True))
    refuse_empty(named, budget, "let the leftover be spent (spend_leftover=True)")
    return named


def _round(factor: float, share: Floats, base: Ints, low: Ints, high: Ints) -> Ints:
    """Return ``base + factor * share``, halves rounded up, clipped to ``[low, high]``."""
    rise = np.clip(np.floor(factor * share + 0.5), low - base, high - base)
    return base + rise.astype(np.int64)


def _largest_factor(
    share: Floats, costs: Ints, base: Ints, low: Ints, high: Ints, budget: int
) -> float:
    """Return the largest float for which the rounded ranks fit, by bisection to neighbours."""

    def fits(factor: float) -> bool:
        return int((_round(factor, share, base, low, high) * costs).sum()) <= budget

    below, above = 0.0, 2.0 * float((high - base).max()) + 1.0
    # Small shares need a larger factor to reach r_max; beyond this bound nothing changes.
    most = min(above / max(float(share[share > 0].min()), 1e-290), 1e300)
    while fits(above):
        if above >= most:
            return above
        above *= 2
    while (middle := below + (above - below) / 2) not in {below, above}:
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def _spend_leftover(
    ranks: Ints,
    names: Sequence[str],
    cut: Floats,
    score: Floats,
    costs: Ints,
    high: Ints,
    slack: int,
) -> None:
    """Raise the ranks that were cut most, one at a time, while they fit; changes ``ranks``."""
    # In billionths, so that cuts which differ by rounding only are ties.
    billionths = [round(value * 1e9) for value in np.clip(cut, -1e6, 1e6).tolist()]
    heap = [
        (-billionths[i], -float(score[i]), int(costs[i]), names[i], i)
        for i in np.flatnonzero(ranks < high).tolist()
    ]
    heapq.heapify(heap)
    while heap:
        negative_cut, negative_score, cost, name, i = heapq.heappop(heap)
        if cost > slack:
            continue
        ranks[i] += 1
        slack -= cost
        if ranks[i] < high[i]:
            heapq.heappush(heap, (negative_cut + 10**9, negative_score, cost, name, i))
