"""How far two allocations agree that differ in nothing but the calibration seed."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
from scipy import stats

from gradrank.evidence.findings import Stability
from gradrank.evidence.runs import Run
from gradrank.evidence.shapes import parameters_of, ranks_of


def rank_agreement(first: Mapping[str, int], second: Mapping[str, int]) -> float | None:
    """Return Spearman's correlation of two allocations' ranks.

    Args:
        first: Rank per target; a target that is missing has rank 0.
        second: The same of the other allocation.

    Returns:
        From -1 to 1: 1 if the two are equal (even where all ranks are the same, which Spearman's
        correlation does not define); None if only one of them tells targets apart, or if there is
        no target.
    """
    names = sorted({*first, *second})
    ours = np.array([first.get(name, 0) for name in names])
    theirs = np.array([second.get(name, 0) for name in names])
    if names and np.array_equal(ours, theirs):
        return 1.0
    if not names or ours.min() == ours.max() or theirs.min() == theirs.max():
        return None
    return float(stats.spearmanr(ours, theirs)[0])  # pyright: ignore[reportArgumentType]


def share_in_common(first: Mapping[str, int], second: Mapping[str, int]) -> float | None:
    """Return the share of parameters that two allocations spend on the same targets.

    Args:
        first: Parameters per target; a target that is missing has none.
        second: The same of the other allocation.

    Returns:
        The sum over targets of the smaller of the two, divided by the larger total: 1 only if the
        two are equal; None if neither spends anything.
    """
    total = max(sum(first.values()), sum(second.values()))
    if total <= 0:
        return None
    return sum(min(first.get(name, 0), second.get(name, 0)) for name in first) / total


def stability_of(runs: Iterable[Run]) -> list[Stability]:
    """Compare the allocations of each cell in pairs.

    Args:
        runs: Runs of the phase ``stability``, one per cell and calibration seed.

    Returns:
        One entry per cell with at least two allocations, by task, budget and method.
    """
    cells: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if ranks_of(run.record, 0):
            cells[run.cell].append(run)
    found: list[Stability] = []
    for cell, members in sorted(cells.items()):
        if len(members) < 2:
            continue
        pairs = list(combinations(sorted(members, key=lambda run: run.seed), 2))
        agreements = [
            rank_agreement(ranks_of(a.record, 0), ranks_of(b.record, 0)) for a, b in pairs
        ]
        # Only one of the two tells targets apart: they agree on nothing that could be ordered.
        known = [0.0 if value is None else value for value in agreements]
        shares = [value for pair in pairs if (value := _share(*pair)) is not None]
        found.append(
            Stability(
                *cell,
                pairs=len(pairs),
                mean=float(np.mean(known)),
                low=min(known),
                high=max(known),
                share=float(np.mean(shares)) if shares else None,
            )
        )
    return found


def _share(first: Run, second: Run) -> float | None:
    ours, theirs = parameters_of(first.record), parameters_of(second.record)
    if ours and theirs:
        return share_in_common(ours, theirs)
    return share_in_common(ranks_of(first.record, 0), ranks_of(second.record, 0))
