"""What a task's one number is made of: accuracy per part of a mixture, and accuracy beside F1."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from gradrank.core.errors import GradrankError
from gradrank.evidence.comparison import Outcome
from gradrank.evidence.items import read_items
from gradrank.evidence.metrics import metric_value
from gradrank.report.comparison.blocks import Entry, Grid, Line
from gradrank.report.comparison.export import plain, plain_text
from gradrank.report.comparison.tables import UNMATCHED, num
from gradrank.report.comparison.view import Row, View, label, mean

MAX_PARTS = 24
COLUMNS: tuple[str, ...] = (
    "task",
    "budget",
    "method",
    "part",
    "metric",
    "mean",
    "sd",
    "seeds",
    "items",
    "matched",
)


@dataclass(frozen=True)
class Slice:
    """One part of one cell.

    Attributes:
        row: The cell.
        part: Name of the part of the task; empty: all of it.
        metric: What was computed on it.
        values: The value of each run that has the part.
        items: Items of the part.
    """

    row: Row
    part: str
    metric: str
    values: tuple[float, ...]
    items: int

    @property
    def name(self) -> str:
        """Heading of its column: the part, or the metric of the whole."""
        return self.part or self.metric

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return sum(self.values) / len(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over runs; None for fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None


def slices_of(view: View, task: str) -> list[Slice]:
    """Return what the numbers of a task are made of.

    Args:
        view: The comparison.
        task: The task.

    Returns:
        Per cell and part the accuracy, where items name two or more parts; accuracy and F1, where
        their mean is the metric; else nothing. Runs whose items are not whole are passed over.
    """
    both = view.metric(task) == "accuracy_f1"
    found = []
    for row in view.of(task):
        values: dict[tuple[str, str], list[float]] = {}
        sizes: dict[tuple[str, str], int] = {}
        for outcome in row.outcomes:
            for key, (value, size) in _values(outcome, both).items():
                values.setdefault(key, []).append(value)
                sizes[key] = size
        found += [Slice(row, *key, tuple(runs), sizes[key]) for key, runs in values.items()]
    return found


def _values(outcome: Outcome, both: bool) -> dict[tuple[str, str], tuple[float, int]]:
    """Return value and items of one run, by part and metric."""
    names = outcome.items.get("group")
    if not both and not names:
        return {}
    try:
        items = read_items(outcome.items)
        if both:
            pair = ("accuracy", "f1")
            return {("", metric): (metric_value(metric, items), items.size) for metric in pair}
    except GradrankError:
        return {}
    if items.right is None or not isinstance(names, list):
        return {}
    right: dict[str, list[float]] = {}
    for name, hit in zip(names, items.right.tolist(), strict=True):
        right.setdefault(name, []).append(hit)
    if len(right) < 2:
        return {}
    return {(name, "accuracy"): (mean(hits) or 0.0, len(hits)) for name, hits in right.items()}


def parts_table(view: View, task: str, position: int) -> Grid | None:
    """Return the parts of a task's numbers: one row per budget and method, one column per part.

    Args:
        view: The comparison.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The table, or None where there are no parts.
    """
    found = slices_of(view, task)
    if not found:
        return None
    sizes = {each.name: each.items for each in found}
    shown = list(sizes)[:MAX_PARTS]
    by_cell: dict[tuple[str, str], dict[str, Slice]] = {}
    for each in found:
        by_cell.setdefault((each.row.budget, each.row.method), {})[each.name] = each
    head = [Entry("method"), Entry("budget")]
    head += [num(f"{label(name, 30)} ({sizes[name]:,} items)") for name in shown]
    budgets = view.budgets
    lines = []
    for (budget, method), own in by_cell.items():
        flag = UNMATCHED if method in view.unmatched else ""
        first = Entry(label(method), label(method), flag=flag)
        place = Entry(label(budget), float(budgets.index(budget)))
        lines.append(Line([first, place, *(_entry(view, task, own.get(n)) for n in shown)]))
    what = "Accuracy per part" if found[0].part else "What the metric is the mean of"
    caption = f"{what}, mean over seeds with its standard deviation. Nothing here is tested."
    if len(sizes) > len(shown):
        caption += f" The first {MAX_PARTS} of {len(sizes)} parts; the CSV file has all."
    return Grid(f"parts-{position}", caption, head, lines)


def _entry(view: View, task: str, each: Slice | None) -> Entry:
    if each is None:
        return num("–")
    small = "" if each.sd is None else f"sd {view.value(task, each.sd)}"
    return num(view.value(task, each.mean), each.mean, small)


def parts_csv(view: View) -> str:
    """Write the parts of all tasks as CSV, one row per task, budget, method, part and metric.

    Args:
        view: The comparison.

    Returns:
        The text, its first row ``COLUMNS``; empty where no task has parts.
    """
    found = [each for task in view.tasks for each in slices_of(view, task)]
    if not found:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_fields(each) for each in found)
    return buffer.getvalue()


def _fields(each: Slice) -> Mapping[str, Any]:
    fields = {
        "task": plain_text(each.row.task),
        "budget": plain_text(each.row.budget),
        "method": plain_text(each.row.method),
        "part": plain_text(each.part),
        "metric": each.metric,
        "mean": each.mean,
        "sd": each.sd,
        "seeds": len(each.values),
        "items": each.items,
        "matched": each.row.cell.matched,
    }
    return {key: plain(value) for key, value in fields.items()}
