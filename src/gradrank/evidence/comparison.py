"""From records to a comparison: cells, contrasts with the reference, tuning, stability."""

from collections.abc import Sequence

import numpy as np

from gradrank.evidence.bootstrap import Spread
from gradrank.evidence.cells import Table, cell_of, contrast_of, table_of
from gradrank.evidence.findings import (
    BudgetInfo,
    Cell,
    Comparison,
    Contrast,
    Excluded,
    Failure,
    Outcome,
    Pooled,
    Stability,
    TaskInfo,
    Tuned,
    Verdict,
)
from gradrank.evidence.pooling import pool
from gradrank.evidence.significance import judge
from gradrank.evidence.sorting import Sorted, sort_out
from gradrank.evidence.stability import stability_of
from gradrank.record.run import RunRecord

__all__ = [
    "BudgetInfo",
    "Cell",
    "Comparison",
    "Contrast",
    "Excluded",
    "Failure",
    "Outcome",
    "Pooled",
    "Stability",
    "TaskInfo",
    "Tuned",
    "Verdict",
    "compare",
]


def compare(
    records: Sequence[RunRecord],
    excluded: Sequence[Excluded | tuple[str, str]] = (),
    reference: str = "uniform",
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Say what the records of one comparison are evidence of.

    Every method is compared with the reference in the same task and at the same budget, paired by
    seed and by item. Intervals and tests are about new seeds and new items of these tasks (see
    :mod:`gradrank.evidence.bootstrap`); p-values are corrected by Holm's method over all contrasts
    that are tested, of all tasks and budgets together. A method is ``better`` or ``worse`` only if
    its corrected p-value is below 0.05 and its interval excludes 0. Arms that are not held to the
    budget are shown and not tested.

    The order of the records makes no difference, and the same records give the same comparison.

    Args:
        records: Records of one recipe, of all phases; see
            :func:`gradrank.evidence.sorting.sort_out` for which of them count.
        excluded: What was left out before, by name and reason.
        reference: Label of the arm that the others are compared with.
        resamples: Bootstrap resamples of the items.
        seed: Seed of the resampling.

    Returns:
        The comparison.
    """
    found = sort_out(records, reference)
    tables = [_table(found, task, reference, resamples, seed) for task in sorted(found.metrics)]
    budgets, methods = _budgets(tables, found), _methods(found, reference)
    cells = _cells(tables, budgets, methods)
    contrasts, spreads = _contrasts(tables, cells, reference)
    before = [entry if isinstance(entry, Excluded) else Excluded(*entry) for entry in excluded]
    return Comparison(
        name=found.name,
        about=found.about,
        source=found.source,
        reference=reference,
        tasks={table.task: _task_info(table) for table in tables},
        budgets=budgets,
        methods=methods,
        cells=tuple(cells),
        contrasts=tuple(contrasts),
        pooled=tuple(pool(cells, contrasts, spreads)),
        tuned=tuple(sorted(found.tuned, key=_tuned_order)),
        stability=tuple(stability_of(found.allocations)),
        failures=tuple(sorted(found.failures, key=lambda f: (f.run_id, f.message))),
        excluded=tuple(sorted([*before, *found.excluded], key=lambda e: (e.name, e.reason))),
    )


def _table(found: Sorted, task: str, reference: str, resamples: int, seed: int) -> Table:
    return table_of(
        task,
        found.metrics[task],
        reference,
        [run for run in found.finals if run.task == task],
        [pair for pair in found.outcomes if pair[0].task == task],
        [trial for trial in found.tuned if trial.task == task],
        resamples,
        seed,
    )


def _task_info(table: Table) -> TaskInfo:
    metric = table.metric
    return TaskInfo(metric.name, metric.higher_is_better, metric.describe, table.size)


def _tuned_order(trial: Tuned) -> tuple[str, str, str, float, int]:
    return trial.task, trial.budget, trial.method, trial.lr, trial.seed


def _budgets(tables: Sequence[Table], found: Sorted) -> tuple[BudgetInfo, ...]:
    texts = {run.budget for run in (*found.finals, *found.allocations)}
    texts |= {trial.budget for trial in found.tuned}
    infos: list[BudgetInfo] = []
    for text in texts:
        counts = {table.task: table.held(text) or table.allowed(text) for table in tables}
        infos.append(BudgetInfo(text, {task: n for task, n in counts.items() if n is not None}))

    def size(info: BudgetInfo) -> tuple[bool, float, str]:
        known = list(info.parameters.values())
        return not known, float(np.mean(known)) if known else 0.0, info.text

    return tuple(sorted(infos, key=size))


def _methods(found: Sorted, reference: str) -> tuple[str, ...]:
    """Return labels: the reference, those held to the budget, and those that are not."""
    matched: dict[str, bool] = {trial.method: True for trial in found.tuned}
    matched |= {run.method: True for run in found.allocations}
    for run in found.finals:
        matched[run.method] = matched.get(run.method, True) and run.matched
    return tuple(sorted(matched, key=lambda label: (label != reference, not matched[label], label)))


def _cells(
    tables: Sequence[Table], budgets: Sequence[BudgetInfo], methods: Sequence[str]
) -> list[Cell]:
    return [
        cell_of(table, budget.text, method)
        for table in tables
        for budget in budgets
        for method in methods
        if (budget.text, method) in table.finals
    ]


def _contrasts(
    tables: Sequence[Table], cells: Sequence[Cell], reference: str
) -> tuple[list[Contrast], dict[tuple[str, str, str], Spread]]:
    by_task = {table.task: table for table in tables}
    own = {(cell.task, cell.budget): cell for cell in cells if cell.method == reference}
    contrasts: list[Contrast] = []
    spreads: dict[tuple[str, str, str], Spread] = {}
    for cell in cells:
        if cell.method == reference:
            continue
        base = own.get((cell.task, cell.budget))
        contrast, spread = contrast_of(by_task[cell.task], cell, base)
        contrasts.append(contrast)
        if spread is not None:
            spreads[cell.task, cell.budget, cell.method] = spread
    return judge(contrasts), spreads
