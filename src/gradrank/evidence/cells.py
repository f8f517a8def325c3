"""Cells and contrasts of one task: means over seeds, differences to the reference, intervals."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gradrank.evidence.bootstrap import Spread, resampled, spread
from gradrank.evidence.caveats import cell_notes, contrast_notes, lost_runs, refusal
from gradrank.evidence.findings import Cell, Contrast, Outcome, Tuned
from gradrank.evidence.items import Items
from gradrank.evidence.metrics import Metric, find_metric
from gradrank.evidence.runs import Run

CellKey = tuple[str, str]
"""Budget and method, in one task."""


@dataclass
class Table:
    """Everything of one task.

    Attributes:
        task: The task.
        metric: The metric that counts.
        reference: Label of the reference.
        size: Items of the split.
        outcomes: Finished runs by cell, in the order of their seeds.
        finals: Runs by cell, failed ones included.
        columns: Column of ``replicates`` by budget, method and seed.
        replicates: The metric on resampled items, ``[R, runs]``.
        tuned: Learning rates that were tried, by cell, and whether each worked for all seeds.
    """

    task: str
    metric: Metric
    reference: str
    size: int
    outcomes: Mapping[CellKey, list[Outcome]]
    finals: Mapping[CellKey, list[Run]]
    columns: Mapping[tuple[str, str, int], int]
    replicates: np.ndarray
    tuned: Mapping[CellKey, Mapping[float, bool]] = field(default_factory=dict)

    def allowed(self, budget: str) -> int | None:
        """Return the adapter parameters of a budget.

        Args:
            budget: Budget as in the recipe.

        Returns:
            What the runs say that they were allowed, at most; else what the reference has.
        """
        runs = [run for (b, _), found in self.finals.items() if b == budget for run in found]
        stated = [count for run in runs if run.matched and (count := run.allowed) is not None]
        return max(stated) if stated else self.held(budget)

    def held(self, budget: str) -> int | None:
        """Return the adapter parameters of the reference at the end.

        Args:
            budget: Budget as in the recipe.

        Returns:
            The number; None where the reference did not finish.
        """
        own = self.outcomes.get((budget, self.reference), [])
        return max((outcome.final for outcome in own), default=None)


def table_of(
    task: str,
    metric: str,
    reference: str,
    finals: Sequence[Run],
    outcomes: Sequence[tuple[Outcome, Items]],
    tuned: Sequence[Tuned],
    resamples: int,
    seed: int,
) -> Table:
    """Gather what is known of one task, and resample its items once for all runs.

    Args:
        task: The task.
        metric: The metric that counts.
        reference: Label of the reference.
        finals: Runs of the task, failed ones included.
        outcomes: The finished ones, all of the same items.
        tuned: Runs of the search for learning rates.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Returns:
        The table.
    """
    by_cell: dict[CellKey, list[Outcome]] = defaultdict(list)
    for outcome, _ in sorted(outcomes, key=lambda pair: pair[0].seed):
        by_cell[outcome.budget, outcome.method].append(outcome)
    runs: dict[CellKey, list[Run]] = defaultdict(list)
    for run in finals:
        runs[run.budget, run.method].append(run)
    rates: dict[CellKey, dict[float, bool]] = defaultdict(dict)
    for trial in tuned:
        known = rates[trial.budget, trial.method]
        known[trial.lr] = known.get(trial.lr, True) and trial.value is not None
    items = [found for _, found in outcomes]
    return Table(
        task=task,
        metric=find_metric(metric),
        reference=reference,
        size=items[0].size if items else 0,
        outcomes=dict(by_cell),
        finals=dict(runs),
        columns={(o.budget, o.method, o.seed): place for place, (o, _) in enumerate(outcomes)},
        replicates=resampled(metric, items, resamples, seed, task) if items else np.empty((0, 0)),
        tuned=dict(rates),
    )


def cell_of(table: Table, budget: str, method: str) -> Cell:
    """Summarise one method at one budget.

    Args:
        table: The task.
        budget: Budget as in the recipe.
        method: Label of the arm.

    Returns:
        The cell; without an interval where fewer than two seeds finished.
    """
    outcomes, runs = table.outcomes.get((budget, method), []), table.finals[budget, method]
    failed = len(runs) - len(outcomes)
    planned = {run.seed for (b, _), found in table.finals.items() if b == budget for run in found}
    missing = tuple(sorted(planned - {run.seed for run in runs}))
    rates = {outcome.lr for outcome in outcomes}
    values = np.array([outcome.value for outcome in outcomes])
    low = high = None
    if len(values) > 1:
        low, high = _spread_of(table, outcomes).interval()
        low, high = max(low, table.metric.lowest), min(high, table.metric.highest)
    return Cell(
        task=table.task,
        budget=budget,
        method=method,
        outcomes=tuple(outcomes),
        failed=failed,
        missing=missing,
        mean=float(values.mean()) if len(values) else None,
        sd=float(values.std(ddof=1)) if len(values) > 1 else None,
        low=low,
        high=high,
        lr=rates.pop() if len(rates) == 1 else None,
        matched=all(run.matched for run in runs),
        notes=cell_notes(outcomes, len(runs), failed, missing),
    )


def contrast_of(table: Table, cell: Cell, reference: Cell | None) -> tuple[Contrast, Spread | None]:
    """Compare a method with the reference, over the seeds that both have.

    Args:
        table: The task.
        cell: The method's cell.
        reference: The reference's cell at this budget; None if there is none.

    Returns:
        The contrast, its p-value not yet corrected, and the spread of the difference; None where
        it is not tested.
    """
    theirs = {outcome.seed: outcome for outcome in reference.outcomes} if reference else {}
    pairs = [(o, theirs[o.seed]) for o in cell.outcomes if o.seed in theirs]
    blank = Contrast(
        task=cell.task,
        budget=cell.budget,
        method=cell.method,
        reference=table.reference,
        seeds=tuple(ours.seed for ours, _ in pairs),
        difference=None,
        low=None,
        high=None,
        p=None,
        p_corrected=None,
        verdict="not tested",
        notes=contrast_notes(table, cell, reference),
        lost=lost_runs(cell, reference),
    )
    reason = refusal(table, cell, reference, len(pairs))
    if not pairs:
        return replace(blank, notes=(reason, *blank.notes)), None
    sign = 1.0 if table.metric.higher_is_better else -1.0
    difference = sign * float(np.mean([ours.value - other.value for ours, other in pairs]))
    found = None if reason else _spread_of(table, *zip(*pairs, strict=True), sign=sign)
    if found is not None and found.constant and difference:
        reason, found = "the difference is the same for every seed and item", None
    if found is None:
        return replace(blank, difference=difference, notes=(reason, *blank.notes)), None
    low, high = found.interval()
    return replace(blank, difference=difference, low=low, high=high, p=found.p_value()), found


def _spread_of(
    table: Table,
    ours: Sequence[Outcome],
    others: Sequence[Outcome] | None = None,
    sign: float = 1.0,
) -> Spread:
    def both(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
        columns = [table.columns[o.budget, o.method, o.seed] for o in outcomes]
        return np.array([outcome.value for outcome in outcomes]), table.replicates[:, columns]

    values, replicates = both(ours)
    if others is not None:
        theirs, resampled_theirs = both(others)
        values, replicates = values - theirs, replicates - resampled_theirs
    return spread(sign * values, sign * replicates, table.size)
