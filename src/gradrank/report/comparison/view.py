"""What the report of a comparison draws from: cleaned labels, finite numbers, one row per cell."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradrank.evidence.comparison import Cell, Comparison, Contrast, Outcome
from gradrank.report.text import as_float, clean, number, signed

MARKS = {
    "better": "▲",
    "worse": "▼",
    "no evidence": "○",
    "not tested": "–",
    "reference": "◆",
}


@dataclass(frozen=True)
class Row:
    """One method on one task at one budget: its cell and its difference to the reference.

    Attributes:
        cell: The values.
        contrast: The difference to the reference; None for the reference itself, or where there
            is nothing to compare with.
        verdict: One of ``VERDICTS``, or ``reference``.
    """

    cell: Cell
    contrast: Contrast | None
    verdict: str

    @property
    def task(self) -> str:
        """Key of the task."""
        return self.cell.task

    @property
    def budget(self) -> str:
        """Text of the budget."""
        return self.cell.budget

    @property
    def method(self) -> str:
        """Label of the method."""
        return self.cell.method

    @property
    def planned(self) -> int:
        """Seeds that this cell should have: those of the other methods."""
        return len(self.cell.outcomes) + self.cell.failed + len(self.cell.missing)

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """The finished runs, in the order of their seeds."""
        return self.cell.outcomes

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without a finished run."""
        return as_float(self.cell.mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean."""
        return _pair(self.cell.low, self.cell.high)

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds; None for less than two."""
        return as_float(self.cell.sd)

    @property
    def difference(self) -> float | None:
        """Difference to the reference; positive is better."""
        return as_float(self.contrast.difference) if self.contrast else None

    @property
    def difference_interval(self) -> tuple[float, float] | None:
        """95 % interval of the difference."""
        return _pair(self.contrast.low, self.contrast.high) if self.contrast else None

    @property
    def p(self) -> float | None:
        """Corrected p value."""
        return as_float(self.contrast.p_corrected) if self.contrast else None

    def average(self, name: str) -> float | None:
        """Return the mean of a number over the finished runs that know it.

        Args:
            name: Attribute of an outcome.

        Returns:
            The mean, or None.
        """
        return mean(as_float(getattr(each, name)) for each in self.cell.outcomes)

    def largest(self, name: str) -> float | None:
        """Return the largest value of a number over the finished runs.

        Args:
            name: Attribute of an outcome.

        Returns:
            The value, or None.
        """
        known = [as_float(getattr(each, name)) for each in self.cell.outcomes]
        return max((value for value in known if value is not None), default=None)


@dataclass(frozen=True)
class View:
    """A comparison as the report shows it.

    Attributes:
        source: The comparison.
        rows: All rows, by task, budget and method.
        digits: Decimals of values and differences, by task.
        unmatched: Methods that are not held to the budget.
    """

    source: Comparison
    rows: Sequence[Row]
    digits: Mapping[str, int]
    unmatched: frozenset[str]

    @property
    def tasks(self) -> list[str]:
        """Tasks that have a row."""
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def budgets(self) -> list[str]:
        """Budgets that have a row."""
        known = [info.text for info in self.source.budgets]
        return in_order((row.budget for row in self.rows), known)

    @property
    def methods(self) -> list[str]:
        """Methods that have a row, the reference first."""
        return in_order((row.method for row in self.rows), self.source.methods)

    @property
    def reference(self) -> str:
        """Label of the method that the others are compared with."""
        return self.source.reference

    def of(self, task: str, budget: str | None = None) -> list[Row]:
        """Return the rows of a task.

        Args:
            task: Key of the task.
            budget: Only this budget; None: all.

        Returns:
            The rows.
        """
        return [r for r in self.rows if r.task == task and budget in {None, r.budget}]

    def higher_is_better(self, task: str) -> bool:
        """Tell whether a higher value of a task's metric is better.

        Args:
            task: Key of the task.

        Returns:
            The direction.
        """
        info = self.source.tasks.get(task)
        return info is None or bool(info.higher_is_better)

    def metric(self, task: str) -> str:
        """Return the name of a task's metric.

        Args:
            task: Key of the task.

        Returns:
            The name; "value" if it is unknown.
        """
        info = self.source.tasks.get(task)
        return label(info.metric) if info is not None else "value"

    def value(self, task: str, value: float | None) -> str:
        """Return a value of a task's metric.

        Args:
            task: Key of the task.
            value: The value.

        Returns:
            The text; a dash for None.
        """
        if value is None or abs(value) >= 1e6:
            return number(value)
        return f"{value:.{self.digits[task]}f}".replace("-", "−")

    def change(self, task: str, value: float) -> str:
        """Return a difference of a task's metric with its sign.

        Args:
            task: Key of the task.
            value: The difference.

        Returns:
            The text.
        """
        return signed(value, self.digits[task]) if abs(value) < 1e6 else number(value)

    def axis(self, task: str) -> str:
        """Return what a task's values are, for the axis of a figure.

        Args:
            task: Key of the task.

        Returns:
            The metric and which direction is better.
        """
        better = "higher" if self.higher_is_better(task) else "lower"
        return f"{self.metric(task)} ({better} is better)"


def read_comparison(source: Comparison) -> View:
    """Arrange a comparison for the report.

    Args:
        source: The comparison.

    Returns:
        The view.
    """
    contrasts = {(c.task, c.budget, c.method): c for c in source.contrasts}
    tasks = list(source.tasks)
    budgets = [info.text for info in source.budgets]
    rows = []
    for cell in source.cells:
        found = contrasts.get((cell.task, cell.budget, cell.method))
        own = cell.method == source.reference
        verdict = "reference" if own else found.verdict if found else "not tested"
        rows.append(Row(cell, None if own else found, verdict))
    rows.sort(key=lambda row: (_place(row.task, tasks), _place(row.budget, budgets)))
    unmatched = frozenset(row.method for row in rows if not row.cell.matched)
    return View(source, tuple(rows), _digits(rows), unmatched)


def label(text: Any, limit: int = 60) -> str:
    """Return a label for the page.

    Args:
        text: Untrusted text.
        limit: Longest result, in characters.

    Returns:
        The text; a dash for an empty one.
    """
    return clean(text, limit).strip() or "–"


def slug(position: int, *texts: str) -> str:
    """Return an identifier of letters, digits and hyphens.

    Args:
        position: Number that makes it distinct.
        *texts: Untrusted texts.

    Returns:
        The identifier.

    Examples:
        >>> slug(1, "SST-2", "<b>")
        '1-sst-2-b'
    """
    words = re.findall(r"[a-z0-9]+", " ".join(texts).lower()[:80])
    return "-".join([str(position), *words])[:40].rstrip("-")


def in_order(found: Iterable[str], known: Iterable[str]) -> list[str]:
    """Sort distinct texts as a list has them; others follow in order of appearance.

    Args:
        found: The texts.
        known: The list.

    Returns:
        The distinct texts.
    """
    distinct = list(dict.fromkeys(found))
    places = {text: i for i, text in enumerate(dict.fromkeys(known))}
    return sorted(distinct, key=lambda text: places.get(text, len(places)))


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the numbers that are known.

    Args:
        values: The numbers.

    Returns:
        The mean, or None if none is known.
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _place(text: str, known: Sequence[str]) -> int:
    return known.index(text) if text in known else len(known)


def _digits(rows: Sequence[Row]) -> dict[str, int]:
    largest: dict[str, float] = {}
    for row in rows:
        largest[row.task] = max(largest.get(row.task, 0.0), abs(row.mean or 0.0))
    return {task: 4 if top < 10 else 3 if top < 100 else 1 for task, top in largest.items()}


def _pair(low: Any, high: Any) -> tuple[float, float] | None:
    ends = as_float(low), as_float(high)
    return (ends[0], ends[1]) if ends[0] is not None and ends[1] is not None else None
