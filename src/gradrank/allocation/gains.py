"""Ranks from measured gains: the knapsack over the directions of every target."""

import heapq
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gradrank.allocation.hull import greedy
from gradrank.allocation.knapsack import solve
from gradrank.allocation.problem import (
    check_budget,
    check_names,
    rank_bounds,
    rank_costs,
    refuse_empty,
)
from gradrank.allocation.table import Candidate
from gradrank.core.errors import MeasurementError, OptionError, nearest
from gradrank.core.targets import Target

Solver = Callable[[Mapping[str, Sequence[Candidate]], int], dict[str, Candidate]]

SOLVERS: dict[str, Solver] = {"exact": solve, "greedy": greedy}


def allocate_gains(
    targets: Sequence[Target],
    gains: Mapping[str, Sequence[float]],
    budget: int,
    *,
    r_min: int = 0,
    r_max: int | None = None,
    solver: str = "exact",
) -> dict[str, int]:
    """Return the ranks with the largest total gain within the budget.

    Args:
        targets: The targets.
        gains: Per target name, the gain of each further rank: ``gains[name][k]`` is what rank
            ``k + 1`` adds to rank ``k``. Finite, 0 or more, in any order and any unit. An empty
            sequence holds the target at ``r_min``.
        budget: Budget in parameters.
        r_min: Smallest rank, clipped to a target's ``max_rank``.
        r_max: Largest rank, clipped to a target's ``max_rank``; None means ``max_rank``. No
            target rises beyond its last direction with a positive gain.
        solver: ``exact`` (knapsack optimum) or ``greedy`` (the fallback and its bound).

    Returns:
        Rank per target name, in the order of ``targets``. The parameters never exceed the
        budget, and the slack is smaller than any next rank that would add a positive gain.

    Raises:
        BudgetError: If the budget is below the floor, above what the measured directions and
            ``r_max`` can spend, or too small for any gain.
        MeasurementError: If a gain is negative or not finite, or all are zero.
        OptionError: If names, bounds or the solver are wrong, or the exact solver needs too much
            memory.
        TargetError: If there is no target, or one is listed twice.

    Examples:
        >>> layers = [Target("a", 4, 4), Target("b", 4, 4)]
        >>> allocate_gains(layers, {"a": [5.0, 4.0, 3.0], "b": [1.0, 0.5]}, budget=24)
        {'a': 3, 'b': 0}
    """
    if solver not in SOLVERS:
        raise OptionError(f"solver '{solver}' is unknown. {nearest(solver, SOLVERS)}")
    costs = rank_costs(targets)
    low, high = rank_bounds(targets, r_min, r_max)
    steps = _steps(targets, gains)
    high = np.minimum(high, np.maximum(low, [_last_positive(step) for step in steps]))
    live = np.array([step.any() for step in steps])
    check_budget(targets, low, high, budget, live=live)
    groups = {
        target.name: _candidates(step, int(low[i]), int(high[i]), int(costs[i]))
        for i, (target, step) in enumerate(zip(targets, steps, strict=True))
    }
    chosen = SOLVERS[solver](groups, budget)
    ranks = {name: int(candidate.capacity) for name, candidate in chosen.items()}
    slack = budget - sum(candidate.cost for candidate in chosen.values())
    _spend_rest(ranks, steps, costs, high, slack)
    refuse_empty(ranks, budget, "choose smaller targets")
    return ranks


def _steps(
    targets: Sequence[Target], gains: Mapping[str, Sequence[float]]
) -> list[NDArray[np.float64]]:
    """Return the marginal gains per target, checked."""
    check_names(targets, gains, "gain")
    steps = [np.asarray(gains[target.name], dtype=np.float64) for target in targets]
    for target, step in zip(targets, steps, strict=True):
        if not (np.isfinite(step) & (step >= 0)).all():
            bad = int(np.flatnonzero(~(np.isfinite(step) & (step >= 0)))[0])
            raise MeasurementError(
                f"target '{target.name}' has the gain {step[bad]} at rank {bad + 1}; a gain must "
                "be finite and 0 or more. Measure again, or look at this target's gradients."
            )
    if not any(step.any() for step in steps):
        raise MeasurementError(
            f"all gains of all {len(targets)} targets are 0: there is nothing to place ranks by. "
            "Check that the loss depends on the targets, or use method 'uniform'."
        )
    return steps


def _last_positive(step: NDArray[np.float64]) -> int:
    """Return the largest rank whose last direction gains something."""
    return int(np.flatnonzero(step)[-1]) + 1 if step.any() else 0


def _candidates(step: NDArray[np.float64], low: int, high: int, cost: int) -> list[Candidate]:
    """Return one candidate per allowed rank; its gain is the sum over its directions."""
    total = np.concatenate(([0.0], np.cumsum(step)))
    # Ranks of r_min beyond the measured directions gain nothing more.
    total = np.pad(total, (0, max(0, high + 1 - total.size)), mode="edge").tolist()
    return [Candidate(rank, rank * cost, total[rank]) for rank in range(low, high + 1)]


def _spend_rest(
    ranks: dict[str, int],
    steps: Sequence[NDArray[np.float64]],
    costs: NDArray[np.int64],
    high: NDArray[np.int64],
    slack: int,
) -> None:
    """Take gains too small for the solver's fixed point, largest first; changes ``ranks``."""

    def offer(i: int, name: str) -> None:
        rank, step = ranks[name], steps[i]
        if rank < high[i] and rank < step.size and step[rank] > 0 and costs[i] <= slack:
            heapq.heappush(heap, (-float(step[rank]), int(costs[i]), name, i))

    heap: list[tuple[float, int, str, int]] = []
    for i, name in enumerate(ranks):
        offer(i, name)
    while heap:
        _, cost, name, i = heapq.heappop(heap)
        if cost <= slack:
            ranks[name] += 1
            slack -= cost
            offer(i, name)
