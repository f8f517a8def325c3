"""Quality against trainable parameters."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gradrank.report.comparison.strips import (
    WIDTH,
    drawable,
    gapped,
    method_marks,
    method_text,
)
from gradrank.report.comparison.view import Row, View, label, slug
from gradrank.report.style import Mark, add_legend, legend_shape
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count

# Widest span, in decades, over which methods of one budget are moved apart.
_WIDEST = 0.36


@look()
def pareto_figure(view: View, task: str, position: int) -> Figure | None:
    """Draw the means of one task over the most adapter parameters in use.

    Args:
        view: The comparison.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The figure, or None where no parameters are known. ``data``: per method lists of
        ``parameters``, ``mean``, ``low`` and ``high``.
    """
    rows = [r for r in view.of(task) if r.mean is not None and r.largest("peak")]
    if not rows:
        return None
    marks = method_marks(view)
    methods = [m for m in view.methods if any(r.method == m for r in rows)]
    names = [method_text(view, method) for method in methods]
    shape = legend_shape(names, WIDTH - 20, 4)
    head = 4 + 19 * shape[0]
    height = head + 330
    drawn = canvas(WIDTH, height)
    ax = drawn.add_axes((78 / WIDTH, 50 / height, (WIDTH - 96) / WIDTH, (330 - 54) / height))
    moved = _apart(rows, methods, view.reference)
    data = {}
    for method in methods:
        own = [row for row in rows if row.method == method]
        _series(ax, own, moved, marks[method], method == view.reference)
        data[method] = _drawn(own)
    _dress(ax, [row.largest("peak") or 1 for row in rows])
    ax.set(xlabel="adapter parameters, most in use (logarithmic)", ylabel=view.metric(task))
    handles = [_handle(view, method, marks[method]) for method in methods]
    add_legend(drawn, handles, names, shape, left=14, handlelength=1.6)
    better = "Higher" if view.higher_is_better(task) else "Lower"
    caption = (
        f"{better} is better. Lines across the marks are 95 % intervals of the mean over seeds and "
        "items. Methods of one budget are moved apart sideways so that their intervals can be "
        "seen; the table has the exact numbers."
    )
    if view.unmatched:
        caption += " Hollow marks (†) are not held to the budget."
    title = f"Quality against parameters: {label(task)}"
    return finish(drawn, f"pareto-{slug(position, task)}", title, caption, data, tall=False)


def _series(
    ax: Axes, rows: Sequence[Row], moved: Mapping[int, float], mark: Mark, bold: bool
) -> None:
    rows = sorted(rows, key=lambda row: moved[id(row)])
    x = [moved[id(row)] for row in rows]
    means = drawable(row.mean for row in rows)
    ends = [(row.interval, at) for row, at in zip(rows, x, strict=True)]
    known = [(pair, at) for pair, at in ends if pair is not None]
    along, across = gapped([pair for pair, _ in known], [at for _, at in known])
    over = 3 if bold else 2
    # Intervals and the line between budgets are one path with gaps.
    style: dict[str, Any] = {"linewidth": 1.8 if bold else 0.9, "alpha": 1 if bold else 0.7}
    joined = rows[0].cell.matched
    xs, ys = ([*across, *x], [*along, *means]) if joined else (across, along)
    ax.plot(xs, ys, color=mark.color, zorder=over, **style)
    face = mark.color if rows[0].cell.matched else "white"
    style = {"markeredgecolor": mark.color, "markerfacecolor": face}
    ax.plot(x, means, linestyle="", marker=mark.marker, markersize=6, zorder=over + 1, **style)


def _apart(rows: Sequence[Row], methods: Sequence[str], reference: str) -> dict[int, float]:
    """Return a place per row; those of one budget are spread around the reference."""
    by_budget: dict[str, list[Row]] = {}
    for row in rows:
        if row.cell.matched:
            by_budget.setdefault(row.budget, []).append(row)
    middles = {b: _middle(group) for b, group in by_budget.items()}
    places = sorted(middles.values())
    gaps = [b - a for a, b in pairwise(places) if b - a > 0.02]
    span = min([_WIDEST, *(0.6 * gap for gap in gaps)])
    moved = {id(row): row.largest("peak") or 1.0 for row in rows}
    for group in by_budget.values():
        others = [row for row in group if row.method != reference]
        others.sort(key=lambda row: methods.index(row.method))
        half = len(others) // 2
        own = [row for row in group if row.method == reference]
        ordered = [*others[:half], *own, *others[half:]]
        for i, row in enumerate(ordered):
            shift = span * (i / (len(ordered) - 1) - 0.5) if len(ordered) > 1 else 0.0
            moved[id(row)] *= 10**shift
    return moved


def _middle(rows: Sequence[Row]) -> float:
    sizes = sorted(math.log10(row.largest("peak") or 1.0) for row in rows)
    return sizes[len(sizes) // 2]


def _dress(ax: Axes, sizes: Sequence[float]) -> None:
    ax.set_xscale("log")
    wide = max(sizes) / max(1.0, min(sizes))
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide > 2000 else (1, 3)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.margins(x=0.05, y=0.06)
    ax.tick_params(length=0)


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return count(value)


def _handle(view: View, method: str, mark: Mark) -> Line2D:
    face = "white" if method in view.unmatched else mark.color
    style: dict[str, Any] = {"markerfacecolor": face, "markersize": 6, "linewidth": 1}
    return Line2D([], [], color=mark.color, marker=mark.marker, **style)


def _drawn(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    return {
        "parameters": [row.largest("peak") for row in rows],
        "mean": [row.mean for row in rows],
        "low": [row.interval[0] if row.interval else None for row in rows],
        "high": [row.interval[1] if row.interval else None for row in rows],
    }
