"""Greedy knapsack along the convex hulls, and the bound of the relaxed problem."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradrank.allocation.table import Candidate, Table, build_table

Ints = NDArray[np.int64]


def greedy(groups: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Candidate]:
    """Pick one candidate per group, the best step per parameter first: the named fallback.

    Each group starts at its cheapest candidate and climbs along the upper convex hull of its
    candidates. Steps are taken in the order of gain per parameter; a group whose next step no
    longer fits stays where it is. A fill-up pass then spends what is left: as long as some group
    can move to a better candidate within the budget, the move with the largest gain is made
    (then the cheaper, then the first by name).

    Args:
        groups: Candidates per group name. Costs in parameters, gains in any unit.
        budget: Budget in parameters.

    Returns:
        The chosen candidate per group name, in the order of ``groups``.

    Raises:
        OptionError: If a group is empty, or a cost or gain is invalid.
        BudgetError: If the cheapest candidates together cost more than the budget.

    **Notes**: the total gain is below ``lp_bound``, and so below the optimum, by less than the
    gain of the first hull step that did not fit. With many groups that is next to nothing; with a
    few groups it may be almost everything.

    Examples:
        >>> layer = [Candidate(0, 0, 0.0), Candidate(1, 3, 5.0), Candidate(2, 6, 6.0)]
        >>> {name: c.capacity for name, c in greedy({"a": layer, "b": layer}, 9).items()}
        {'a': 2, 'b': 1}
    """
    if not groups:
        return {}
    table = build_table(groups, budget)
    steps = _hull_steps(table)
    columns = np.zeros(len(table.names), np.int64)
    stuck = np.zeros(len(table.names), np.bool_)
    left = table.budget
    moves = (steps.row.tolist(), steps.column.tolist(), steps.cost.tolist())
    for row, column, cost in zip(*moves, strict=True):
        if stuck[row] or cost > left:
            stuck[row] = True
            continue
        columns[row] = column
        left -= cost
    _fill_up(table, columns, left)
    return table.pick(groups, columns)


def lp_bound(groups: Mapping[str, Sequence[Candidate]], budget: int) -> float:
    """Return the optimum of the relaxed knapsack, in which the last step may be taken in part.

    The budget counts in whole units of the costs' greatest common divisor, of which no choice can
    spend a part.

    Args:
        groups: Candidates per group name. Costs in parameters, gains in any unit.
        budget: Budget in parameters.

    Returns:
        Upper bound on the total gain of any choice within the budget, up to rounding (1e-12 of
        the sum of absolute gains).

    Raises:
        OptionError: If a group is empty, or a cost or gain is invalid.
        BudgetError: If the cheapest candidates together cost more than the budget.

    **Source**: Zemel, Information Processing Letters 18 (1984); Dyer, Mathematical Programming
    29 (1984).

    Examples:
        >>> steps = [Candidate(0, 0, 0.0), Candidate(1, 4, 8.0)]
        >>> lp_bound({"a": steps, "b": [Candidate(0, 0, 0.0), Candidate(1, 2, 6.0)]}, 4)
        10.0
    """
    if not groups:
        return 0.0
    table = build_table(groups, budget)
    steps = _hull_steps(table)
    spent = np.cumsum(steps.cost)
    whole = int(np.searchsorted(spent, table.budget, side="right"))
    total = float(table.base_gain + int(steps.gain[:whole].sum()))
    if whole < spent.size:
        left = table.budget - (int(spent[whole - 1]) if whole else 0)
        total += float(steps.gain[whole]) * left / float(steps.cost[whole])
    return total * table.quantum


@dataclass(frozen=True)
class _Steps:
    """Hull steps of all rows, best gain per cost first, each row's in their order."""

    row: Ints
    column: Ints
    cost: Ints
    gain: Ints


def _hull_steps(table: Table) -> _Steps:
    """Walk along the upper convex hull of every row at once, one corner per pass."""
    n, k = table.cost.shape
    rows, at = np.arange(n), np.zeros(n, np.int64)
    efficiency = np.full(n, np.inf)
    found: list[tuple[Ints, Ints, Ints, Ints, NDArray[np.float64]]] = []
    while rows.size:
        cost = table.cost[rows] - table.cost[rows, at][:, None]
        gain = table.gain[rows] - table.gain[rows, at][:, None]
        ahead = table.kept[rows] & (np.arange(k) > at[:, None])
        slope = np.where(ahead, gain / np.where(ahead, cost, 1), -1.0)
        to = slope.argmax(axis=1)
        each = np.arange(rows.size)
        # The minimum keeps a row's steps in order where rounding makes a straight line bend up.
        efficiency = np.minimum(efficiency, slope[each, to])
        going = ahead[each, to]
        rows, to, efficiency, each = rows[going], to[going], efficiency[going], each[going]
        found.append((rows, to, cost[each, to], gain[each, to], efficiency))
        at = to
    row, column, cost, gain, slopes = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((column, row, -slopes))
    return _Steps(row[order], column[order], cost[order], gain[order])


def _fill_up(table: Table, columns: Ints, left: int) -> None:
    """Make the best move that fits until none is left; changes ``columns``."""
    rows = np.arange(len(table.names))
    while True:
        cost = table.cost - table.cost[rows, columns][:, None]
        gain = np.where(
            table.kept & (cost <= left), table.gain - table.gain[rows, columns][:, None], 0
        )
        best = int(gain.max())
        if best <= 0:
            return
        row, column = np.nonzero(gain == best)
        first = np.lexsort((row, cost[row, column]))[0]
        left -= int(cost[row[first], column[first]])
        columns[row[first]] = column[first]
