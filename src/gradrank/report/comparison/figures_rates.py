"""The search for learning rates: one small curve per method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gradrank.report.comparison.strips import Strip, strips
from gradrank.report.comparison.view import View, in_order, label, mean, slug
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import as_float, number

_CURVE, _CHOSEN, _WARN = "#0072B2", "#000000", "#B04300"
_ROOM = 0.38
_MOST_DOTTED = 24


@dataclass(frozen=True)
class Search:
    """The learning rates tried by one method on one task at one budget.

    Attributes:
        task: Task.
        budget: Budget.
        method: Method.
        values: Mean value over the runs of each rate, by rate in rising order; None where a run
            diverged or failed.
        best: The rate with the best value; None if every rate failed.
        chosen: The rate of the reported runs; None if there are none.
    """

    task: str
    budget: str
    method: str
    values: Mapping[float, float | None]
    best: float | None
    chosen: float | None

    @property
    def at_edge(self) -> bool:
        """Whether the best, or the chosen, rate is the lowest or the highest that was tried."""
        rates = list(self.values)
        ends = {rates[0], rates[-1]}
        return len(rates) > 1 and (self.best in ends or self.chosen in ends)


def searches(view: View) -> list[Search]:
    """Gather the search of every cell.

    Args:
        view: The comparison.

    Returns:
        The searches, by task, budget and method.
    """
    found: dict[tuple[str, str, str], dict[float, list[float | None]]] = {}
    for run in view.source.tuned:
        rate = as_float(run.lr)
        if rate is not None and rate > 0:
            rates = found.setdefault((run.task, run.budget, run.method), {})
            rates.setdefault(rate, []).append(as_float(run.value))
    chosen = {(row.task, row.budget, row.method): row.cell.lr for row in view.rows}
    result = []
    for key, rates in found.items():
        # A rate that diverged for one seed is not averaged over the others.
        values = {r: None if None in rates[r] else mean(rates[r]) for r in sorted(rates)}
        better = max if view.higher_is_better(key[0]) else min
        known = {rate: value for rate, value in values.items() if value is not None}
        best = better(known, key=known.__getitem__) if known else None
        result.append(Search(*key, values, best, as_float(chosen.get(key))))
    methods = in_order((search.method for search in result), view.source.methods)
    return sorted(result, key=lambda search: methods.index(search.method))


@look()
def rates_figure(view: View, every: Sequence[Search], task: str, position: int) -> Figure | None:
    """Draw the searches of one task, one panel per budget and one curve per method.

    Args:
        view: The comparison.
        every: From :func:`searches`.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The figure, or None where nothing was searched. ``data``: per budget and method ``values``
        by rate, ``chosen`` and ``at_edge``.
    """
    own = [s for s in every if s.task == task and any(v is not None for v in s.values.values())]
    budgets = in_order((s.budget for s in own), [info.text for info in view.source.budgets])
    if not own:
        return None
    panels = {b: [s for s in own if s.budget == b] for b in budgets}
    frames = [Strip(f"budget {label(b, 40)}", [s.method for s in panels[b]]) for b in budgets]
    drawn, axes = strips(view, frames, ["learning rate"], _legend(own), right=84, roomy=True)
    rates = sorted({rate for search in own for rate in search.values})
    heights = {}
    for ax, budget in zip(axes, budgets, strict=True):
        heights[budget] = _panel(ax, panels[budget], view.higher_is_better(task))
        _dress(ax, rates)
    caption = (
        f"{view.metric(task)} on the validation split; up is better within each row, and all rows "
        f"of a panel have one scale: a full row is {_spans(heights)}. Values far below the best "
        "are drawn at the bottom of their row, diverged runs as crosses. The number at the right "
        "is the chosen rate."
    )
    if any(search.at_edge for search in own):
        caption += (
            " ⚠: the best or the chosen rate is the lowest or highest that was tried, so a better "
            "one may lie outside."
        )
    name, title = f"rates-{slug(position, task)}", f"Learning rates: {label(task)}"
    data = {b: {s.method: _drawn(s) for s in panels[b]} for b in budgets}
    return finish(drawn, name, title, caption, data, tall=True)


def _panel(ax: Axes, found: Sequence[Search], higher: bool) -> float:
    """Draw curves in their rows; return the difference that a full row stands for."""
    sign = 1 if higher else -1
    values = [sign * v for s in found for v in s.values.values() if v is not None]
    top = max(values)
    losses = sorted(top - value for value in values)
    span = losses[int(0.75 * (len(losses) - 1))] or losses[-1] or 1.0
    curves, gone, rings = _Points(), _Points(), _Points()
    for row, search in enumerate(found):
        for rate, value in search.values.items():
            if value is None:
                curves.add(rate, math.nan)
                gone.add(rate, row + _ROOM)
                continue
            height = row + _ROOM - 2 * _ROOM * max(0.0, 1 - (top - sign * value) / span)
            curves.add(rate, height)
            if rate == search.chosen:
                rings.add(rate, height)
        curves.add(math.nan, math.nan)
        _beside(ax, row, search)
    # One line with gaps for all curves: a line of its own for each would take most of the time.
    # In a large grid the dots would be most of the page, and the grid lines mark the rates too.
    dots = "." if len(found) <= _MOST_DOTTED else ""
    ax.plot(curves.x, curves.y, color=_CURVE, linewidth=1.3, marker=dots, markersize=4)
    ax.plot(gone.x, gone.y, "x", color=_WARN, markersize=5)
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": _CHOSEN}
    ax.plot(rings.x, rings.y, "o", markersize=8, clip_on=False, **ring)
    return span


@dataclass
class _Points:
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        self.x.append(x)
        self.y.append(y)


def _beside(ax: Axes, row: int, search: Search) -> None:
    """Write the chosen rate at the right of its row."""
    text = f"{search.chosen:g}" if search.chosen is not None else "no run"
    style: dict[str, Any] = {"va": "center_baseline", "fontsize": 10.5}
    ax.text(
        1.02,
        row,
        f"{text} ⚠" if search.at_edge else text,
        transform=ax.get_yaxis_transform(),
        color=_WARN if search.at_edge else "#333333",
        **style,
    )


def _legend(found: Sequence[Search]) -> tuple[list[Line2D], list[str]]:
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": _CHOSEN}
    handles = [
        Line2D([], [], color=_CURVE, marker=".", linewidth=1.3),
        Line2D([], [], linestyle="", marker="o", markersize=8, **ring),
    ]
    labels = ["tried", "chosen"]
    if any(value is None for search in found for value in search.values.values()):
        handles.append(Line2D([], [], linestyle="", marker="x", color=_WARN, markersize=5))
        labels.append("diverged")
    return handles, labels


def _dress(ax: Axes, rates: Sequence[float]) -> None:
    ax.set_xscale("log")
    every = math.ceil(len(rates) / 6)
    ax.xaxis.set_major_locator(FixedLocator(list(rates)[::every]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.margins(x=0.06)


def _spans(heights: Mapping[str, float]) -> str:
    texts = dict.fromkeys(number(height, 2) for height in heights.values())
    if len(texts) == 1:
        return next(iter(texts))
    return ", ".join(f"{number(h, 2)} at {label(b, 24)}" for b, h in heights.items())


def _drawn(search: Search) -> dict[str, Any]:
    values = {f"{rate:g}": value for rate, value in search.values.items()}
    return {"values": values, "chosen": search.chosen, "at_edge": search.at_edge}
