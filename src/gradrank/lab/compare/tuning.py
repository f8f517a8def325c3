"""The learning rate of each cell: the one with the best validation metric, found once."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from gradrank.evidence.metrics import METRICS
from gradrank.lab.compare.grid import GridRun
from gradrank.lab.compare.store import Found
from gradrank.record import RunRecord

Cell = tuple[str, str, str]


def chosen_rates(runs: Sequence[GridRun], found: Found) -> dict[Cell, float]:
    """Return the best learning rate of each cell.

    A rate counts by its mean over the tuning seeds. A rate of which any run failed is passed over:
    a rate that diverges for one seed is no rate to report with. Ties go to the smaller rate.

    Args:
        runs: All tuning runs.
        found: Their records.

    Returns:
        Rate by task, method and budget; a cell of which every rate failed is missing.
    """
    values: dict[Cell, dict[float, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        record = found.finished(run)
        value = None if record is None else value_of(record)
        values[cell_of(run)][run.config.lr].append(value)
    best: dict[Cell, float] = {}
    for cell, rates in values.items():
        means = {rate: _mean(found_values) for rate, found_values in rates.items()}
        known = {rate: mean for rate, mean in means.items() if mean is not None}
        if known:
            best[cell] = max(sorted(known), key=lambda rate: known[rate])
    return best


def cell_of(run: GridRun) -> Cell:
    """Return the cell of the table that a run belongs to.

    Args:
        run: The run.

    Returns:
        Task, label of the method, budget.
    """
    return run.task, run.label, run.budget


def value_of(record: RunRecord) -> float | None:
    """Return a run's metric that counts, turned so that more is better.

    Args:
        record: Its record.

    Returns:
        The value; None if the record lacks it.
    """
    about: Mapping[str, object] = record.comparison or {}
    name = str(about.get("metric"))
    value = record.metrics.get(name)
    if value is None or name not in METRICS:
        return None
    return value if METRICS[name].higher_is_better else -value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
