"""Differences to the reference with their intervals, and the values behind them by seed."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradrank.report.comparison.strips import Strip, drawable, gapped, reach, strips
from gradrank.report.comparison.view import MARKS, Row, View, label, slug
from gradrank.report.style import Mark, type_marks
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import as_float, plural

_STYLES: Mapping[str, tuple[str, str, bool]] = {  # colour, marker, filled
    "better": ("#0072B2", "^", True),
    "worse": ("#D55E00", "v", True),
    "no evidence": ("#555555", "o", False),
    "not tested": ("#555555", "|", False),
}
_MOST_SEEDS = 10


@look()
def contrast_figure(view: View, task: str, position: int) -> Figure | None:
    """Draw the differences of one task, one panel per budget.

    Args:
        view: The comparison.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The figure, or None where nothing has a difference. ``data``: per budget and method the
        ``difference``, ``low``, ``high`` and ``verdict``.
    """
    panels = _panels(view, task, lambda row: row.difference is not None)
    if not panels:
        return None
    rows = [row for group in panels.values() for row in group]
    ends = [e for row in rows for e in (row.difference_interval or ())]
    limit = reach([*ends, *(row.difference or 0.0 for row in rows if row.cell.matched)])
    shown = [v for v in _STYLES if any(row.verdict == v for row in rows)]
    handles = [_handle(verdict) for verdict in shown]
    frames = [Strip(f"budget {label(b, 40)}", [r.method for r in panels[b]]) for b in panels]
    x_label = f"{view.metric(task)}: difference to {label(view.reference, 20)}, right is better"
    drawn, axes = strips(view, frames, [x_label], (handles, shown))
    for ax, group in zip(axes, panels.values(), strict=True):
        ax.axvline(0, color="#222222", linewidth=1)
        _differences(ax, group, limit)
        ax.set_xlim(-limit, limit)
    caption = (
        f"Marks are mean differences over the seeds that a method shares with "
        f"{label(view.reference)}; lines are 95 % intervals over seeds and items. A line that "
        "crosses zero, or a difference that does not survive the correction for many tests, is "
        "no evidence."
    )
    caption += _outside(rows, limit)
    data = {b: {r.method: _drawn(r) for r in group} for b, group in panels.items()}
    name = f"contrast-{slug(position, task)}"
    return finish(drawn, name, f"Difference by method: {label(task)}", caption, data, tall=True)


def _differences(ax: Axes, rows: Sequence[Row], limit: float) -> None:
    for verdict, (colour, marker, filled) in _STYLES.items():
        chosen = [(i, row) for i, row in enumerate(rows) if row.verdict == verdict]
        lines = [(i, row.difference_interval) for i, row in chosen]
        known = [(i, ends) for i, ends in lines if ends is not None]
        along, across = gapped([ends for _, ends in known], [i for i, _ in known])
        ax.plot(along, across, color=colour, linewidth=1.8 if filled else 1.2)
        inside = [(i, d) for i, row in chosen if abs(d := row.difference or 0.0) <= limit]
        _dots(ax, inside, marker, colour, colour if filled else "white")
        for sign, arrow in ((1, ">"), (-1, "<")):
            beyond = [(i, row) for i, row in chosen if sign * (row.difference or 0.0) > limit]
            edge = [(i, sign * 0.97 * limit) for i, _ in beyond]
            _dots(ax, edge, arrow, colour, colour)


def _dots(ax: Axes, points: Sequence[tuple[int, float]], marker: str, edge: str, face: str) -> None:
    if points:
        at, values = zip(*points, strict=True)
        style: dict[str, Any] = {"markeredgecolor": edge, "markerfacecolor": face}
        ax.plot(values, at, linestyle="", marker=marker, markersize=7, **style)


def _handle(verdict: str) -> Line2D:
    colour, marker, filled = _STYLES[verdict]
    face = colour if filled else "white"
    style: dict[str, Any] = {"color": colour, "markerfacecolor": face, "markersize": 7}
    return Line2D([], [], marker=marker, linewidth=1.2 if verdict != "not tested" else 0, **style)


def _drawn(row: Row) -> dict[str, Any]:
    ends = row.difference_interval or (None, None)
    found = {"difference": row.difference, "low": ends[0], "high": ends[1]}
    return {**found, "verdict": row.verdict, "mark": MARKS[row.verdict]}


def _outside(rows: Sequence[Row], limit: float) -> str:
    beyond = sum(1 for row in rows if abs(row.difference or 0.0) > limit)
    if not beyond:
        return ""
    return (
        f" Arrows at the edge stand for {plural(beyond, 'difference')} beyond the "
        "axis, which the table gives."
    )


@look()
def seeds_figure(view: View, task: str, position: int) -> Figure | None:
    """Draw the value of every seed, one panel per budget; runs of one seed are joined.

    Args:
        view: The comparison.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The figure, or None without a finished run. ``data``: per budget and method the value by
        seed.
    """
    panels = _panels(view, task, lambda row: bool(row.outcomes))
    if not panels:
        return None
    rows = [row for group in panels.values() for row in group]
    seeds = sorted({each.seed for row in rows for each in row.outcomes})
    marks = _seed_marks(seeds)
    frames = [Strip(f"budget {label(b, 40)}", [r.method for r in panels[b]]) for b in panels]
    legend = _seed_legend(marks) if 1 < len(seeds) <= _MOST_SEEDS else None
    drawn, axes = strips(view, frames, [view.axis(task)], legend)
    for ax, group in zip(axes, panels.values(), strict=True):
        for seed in seeds:
            values = [_value_of(row, seed) for row in group]
            _one_seed(ax, values, marks[seed])
        means = drawable(row.mean for row in group)
        style: dict[str, Any] = {"marker": "|", "markersize": 14, "markeredgewidth": 2.2}
        ax.plot(means, range(len(group)), linestyle="", color="#000000", **style)
        ax.margins(x=0.06)
    caption = (
        "One mark per seed; the black bar is the mean. Thin lines join the runs of one seed: "
        "where they run side by side, the seed matters more than the method."
    )
    data = {
        b: {r.method: {str(e.seed): as_float(e.value) for e in r.outcomes} for r in group}
        for b, group in panels.items()
    }
    name = f"seeds-{slug(position, task)}"
    return finish(drawn, name, f"Every seed: {label(task)}", caption, data, tall=True)


def _one_seed(ax: Axes, values: Sequence[float | None], mark: Mark) -> None:
    at, known = range(len(values)), drawable(values)
    ax.plot(known, at, color=mark.color, linewidth=0.6, alpha=0.45)
    style: dict[str, Any] = {"marker": mark.marker, "markersize": 4.5, "alpha": 0.85}
    ax.plot(known, at, linestyle="", color=mark.color, markeredgewidth=0, **style)


def _value_of(row: Row, seed: int) -> float | None:
    return next((as_float(each.value) for each in row.outcomes if each.seed == seed), None)


def _seed_marks(seeds: Sequence[int]) -> dict[int, Mark]:
    base = list(type_marks([str(i) for i in range(_MOST_SEEDS)]).values())
    return {seed: base[i % len(base)] for i, seed in enumerate(seeds)}


def _seed_legend(marks: Mapping[int, Mark]) -> tuple[list[Line2D], list[str]]:
    handles = [
        Line2D([], [], color=m.color, marker=m.marker, linewidth=0.6, markersize=4.5)
        for m in marks.values()
    ]
    return handles, [f"seed {seed}" for seed in marks]


def _panels(view: View, task: str, keep: Any) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    for row in view.of(task):
        if keep(row):
            panels.setdefault(row.budget, []).append(row)
    return panels
