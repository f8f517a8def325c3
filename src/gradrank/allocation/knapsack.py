"""Exact multiple-choice knapsack: one candidate per group, largest total gain within a budget."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradrank.allocation.table import Candidate, Table, build_table
from gradrank.core.errors import OptionError

MEMORY_LIMIT = 2**30
_FIRST_CORE = 16
# Measured: merging sorted runs takes this many times longer per trial than one pass over a table,
# which needs this many passes beside those over the candidates.
_SPARSE_FACTOR = 40
_DENSE_PASSES = 10
_UNREACHED = -(2**62)

Ints = NDArray[np.int64]


def solve(groups: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Candidate]:
    """Pick exactly one candidate per group with the largest total gain within the budget.

    The result is an optimum, not an approximation. Of several optima the cheapest is taken; of
    several cheapest ones the one whose costs, read in the order of the names, come first in
    lexicographic order. So the outcome depends neither on the order of the groups nor on chance.

    Args:
        groups: Candidates per group name. Costs in parameters, gains in any unit.
        budget: Budget in parameters.

    Returns:
        The chosen candidate per group name, in the order of ``groups``.

    **Source**: Lagrangian reduction and dynamic programming over a core, after Dudzinski and
    Walukiewicz, EJOR 28 (1987), and Pisinger, EJOR 83 (1995). Differs: the core grows until a
    proof of optimality appears, which needs no lower bound.

    **Notes**: with a price ``p`` per parameter, every choice within the budget falls short of
    the Lagrangian bound by exactly its *shortfall*: the sum over groups of what its candidate
    loses against the group's best at that price, plus ``p`` times the parameters left over.
    The search goes through all choices whose shortfall stays within a limit; if it finds any,
    the best of them is optimal, otherwise the limit grows. All arithmetic is in whole numbers:
    gains are rounded to at most ``2**-56`` of their total (see ``build_table``). A gcd unit with
    all candidates in the core is the full table, as a last resort; it may take up to
    ``MEMORY_LIMIT`` bytes (1 GiB).

    Raises:
        OptionError: If a group is empty, a cost or gain is invalid, or the search would need
            more than ``MEMORY_LIMIT``; the message names the greedy fallback.
        BudgetError: If the cheapest candidates together cost more than the budget.

    Examples:
        >>> layer = [Candidate(0, 0, 0.0), Candidate(1, 3, 5.0), Candidate(2, 6, 6.0)]
        >>> {name: c.capacity for name, c in solve({"a": layer, "b": layer}, 9).items()}
        {'a': 1, 'b': 2}
    """
    if not groups:
        return {}
    table = build_table(groups, budget)
    return table.pick(groups, _optimum(table))


@dataclass(frozen=True)
class _Relaxed:
    """A table at a price: the best column per row, and what every other one loses."""

    table: Table
    price: int
    best: Ints
    loss: Ints
    slack: int


@dataclass(frozen=True)
class _Stage:
    """The choices that one row has left, as changes against its best column, cheapest first."""

    row: int
    columns: Ints
    cost: Ints
    gain: Ints


@dataclass(frozen=True)
class _States:
    """Outcomes of the rows so far: cost and gain changes, both strictly increasing, ``[s]``."""

    cost: Ints
    gain: Ints


def _optimum(table: Table) -> Ints:
    """Return the optimal column per row."""
    relaxed = _relax(table)
    for limit in _limits(relaxed):
        found = _search(relaxed, limit)
        if found is not None:
            return found
    raise AssertionError("the last limit always admits the relaxed choice")


def _relax(table: Table) -> _Relaxed:
    """Find the price at which the best columns just fit, by bisection over whole prices."""
    low, high = -1, int(table.gain.max(axis=1).sum()) // max(table.budget, 1) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _spent(table, _best(table, middle)) <= table.budget:
            high = middle
        else:
            low = middle
    reduced = table.gain - high * table.cost
    best = _best(table, high)
    loss = np.take_along_axis(reduced, best[:, None], axis=1) - reduced
    return _Relaxed(table, high, best, loss, table.budget - _spent(table, best))


def _best(table: Table, price: int) -> Ints:
    """Return the column with the largest gain net of price per row, the cheapest of equals."""
    return (table.gain - price * table.cost).argmax(axis=1)


def _spent(table: Table, columns: Ints) -> int:
    return int(np.take_along_axis(table.cost, columns[:, None], axis=1).sum())


def _limits(relaxed: _Relaxed) -> Iterator[int]:
    """Yield growing limits on the shortfall; the last is that of the relaxed choice itself."""
    last = relaxed.price * relaxed.slack
    losses = np.sort(relaxed.loss[(relaxed.loss > 0) & (relaxed.loss < last)])
    size = _FIRST_CORE
    while size < losses.size:
        yield int(losses[size])
        size *= 2
    yield last


def _search(relaxed: _Relaxed, limit: int) -> Ints | None:
    """Return the optimal columns if some choice has a shortfall within the limit, else None."""
    stages = _open_stages(relaxed, limit)
    up = sum(int(stage.cost[-1]) for stage in stages)
    down = sum(int(stage.cost[0]) for stage in stages)
    path, stored = [_States(np.zeros(1, np.int64), np.zeros(1, np.int64))], 0
    grid = 0
    for stage in stages:
        up -= int(stage.cost[-1])
        down -= int(stage.cost[0])
        grid = math.gcd(grid, *stage.cost.tolist())
        states = _extend(relaxed.table, path[-1], stage, grid)
        # What is still to come can neither bring these back into the budget nor fill it enough.
        unspent = np.maximum(relaxed.slack - up - states.cost, 0)
        shortfall = relaxed.price * (states.cost + unspent) - states.gain
        alive = (states.cost + down <= relaxed.slack) & (shortfall <= limit)
        if not alive.any():
            return None
        path.append(_States(states.cost[alive], states.gain[alive]))
        stored += 2 * path[-1].cost.nbytes
        _check_memory(relaxed.table, stored)
    return _trace(relaxed, stages, path)


def _open_stages(relaxed: _Relaxed, limit: int) -> list[_Stage]:
    """Return a stage for every row with a choice left, last name first."""
    within = relaxed.loss <= limit
    stages = []
    for row in np.flatnonzero(within.sum(axis=1) > 1)[::-1].tolist():
        columns, best = np.flatnonzero(within[row]), relaxed.best[row]
        cost, gain = relaxed.table.cost[row], relaxed.table.gain[row]
        stages.append(_Stage(row, columns, cost[columns] - cost[best], gain[columns] - gain[best]))
    return stages


def _extend(table: Table, states: _States, stage: _Stage, grid: int) -> _States:
    """Combine every state with every choice; keep the states that no cheaper one matches."""
    trials = states.cost.size * stage.cost.size
    places = int(states.cost[-1] - states.cost[0] + stage.cost[-1] - stage.cost[0]) // grid + 1
    dense = places * (stage.cost.size + _DENSE_PASSES) <= _SPARSE_FACTOR * trials
    _check_memory(table, 64 * (places if dense else trials))
    if dense:
        cost, gain = _extend_dense(states, stage, grid, places)
    else:
        cost, gain = _extend_sparse(states, stage)
    record = np.maximum.accumulate(gain)
    # The first place is always reached, so that places not reached never break a record.
    kept = np.concatenate(([0], np.flatnonzero(gain[1:] > record[:-1]) + 1))
    # Of one cost, the last record holder has the largest gain.
    kept = kept[np.append(np.diff(cost[kept]) != 0, True)]
    return _States(cost[kept], gain[kept])


def _extend_dense(states: _States, stage: _Stage, grid: int, places: int) -> tuple[Ints, Ints]:
    """Extend in a table with one place per cost; places not reached hold a very low gain."""
    offset = (states.cost - states.cost[0]) // grid
    known = np.full(int(offset[-1]) + 1, _UNREACHED, np.int64)
    known[offset] = states.gain
    gain = np.full(places, _UNREACHED, np.int64)
    starts = ((stage.cost - stage.cost[0]) // grid).tolist()
    for start, gained in zip(starts, stage.gain.tolist(), strict=True):
        place = gain[start : start + known.size]
        np.maximum(place, known + gained, out=place)
    return states.cost[0] + stage.cost[0] + grid * np.arange(places), gain


def _extend_sparse(states: _States, stage: _Stage) -> tuple[Ints, Ints]:
    """Extend by merging one sorted run per choice."""
    cost = (stage.cost[:, None] + states.cost).ravel()
    gain = (stage.gain[:, None] + states.gain).ravel()
    order = cost.argsort(kind="stable")
    return cost[order], gain[order]


def _trace(relaxed: _Relaxed, stages: list[_Stage], path: list[_States]) -> Ints:
    """Walk back from the best final state, first name first, cheapest of equals."""
    columns = relaxed.best.copy()
    cost, gain = path[-1].cost[-1], path[-1].gain[-1]
    for stage, before in zip(reversed(stages), reversed(path[:-1]), strict=True):
        place = np.searchsorted(before.cost, cost - stage.cost)
        place = np.minimum(place, before.cost.size - 1)
        leads = (before.cost[place] + stage.cost == cost) & (
            before.gain[place] + stage.gain == gain
        )
        number = int(leads.argmax())
        columns[stage.row] = stage.columns[number]
        cost, gain = cost - stage.cost[number], gain - stage.gain[number]
    return columns


def _check_memory(table: Table, needed: int) -> None:
    if needed > MEMORY_LIMIT:
        raise OptionError(
            f"the exact knapsack over {len(table.names):,} groups and a budget of "
            f"{table.budget:,} units of {table.unit:,} parameters needs more than "
            f"{MEMORY_LIMIT / 2**20:,.0f} MiB: costs have too small a common divisor for bounds to "
            "shrink the search. Use solver='greedy' (gradrank.allocation.greedy), which loses less "
            "than the gain of one step, or offer fewer candidates."
        )
