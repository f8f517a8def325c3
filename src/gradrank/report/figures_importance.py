"""How important the directions are that were kept, against how many each target kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradrank.report.figures_scores import spearman
from gradrank.report.history import History
from gradrank.report.layout import Layout
from gradrank.report.style import (
    add_legend,
    legend_shape,
    log_ticks,
    safe,
    type_key,
    type_marks,
    whole_ticks,
)
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, number, plural, power_of_ten
from gradrank.report.view import Run

_WIDTH, _LEFT, _RIGHT = 500, 70, 14
# Positive values that differ more than this are drawn on a logarithmic axis.
_SPREAD = 100.0
# Values so small are nothing: no unit could write them.
_TINY = 1e-200


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of the directions that a target kept."""

    rank: int
    importance: float


@look()
def importance_against_rank(run: Run, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw the importance of each target's directions against their number, last decision.

    Args:
        run: The run.
        layout: Gives the module types.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if no importance of a target with directions is known. ``data``:
        ``step``, ``points`` (by module type, lists of ``[rank, importance]``), ``mean`` (importance
        per direction over all of them), ``spearman`` (of rank and importance per direction) and
        ``log`` (whether the axis is logarithmic).
    """
    found = last_importance(run.history) if run.history else None
    if found is None:
        return None
    step, kept = found
    marks = type_marks(layout.rows)
    groups: dict[str, list[Kept]] = {}
    for name, each in kept.items():
        groups.setdefault(type_key(layout.row_of(name), marks), []).append(each)
    groups = {key: groups[key] for key in marks if key in groups}
    mean = math.fsum(each.importance for each in kept.values()) / sum(
        each.rank for each in kept.values()
    )
    axis = _Axis.of([each.importance for each in kept.values()])
    labels = [safe(key, 24) for key in groups]
    shape = legend_shape(labels, _WIDTH - 20, 4)
    head, tall = 12 + 20 * shape[0], 250
    height = head + tall + 46
    drawn = canvas(_WIDTH, height)
    ax = drawn.add_axes(
        (_LEFT / _WIDTH, 46 / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, tall / height)
    )
    most = max(each.rank for each in kept.values())
    for i, (key, members) in enumerate(groups.items()):
        # Many targets share a rank: types are set apart a little, in the legend's order.
        offset = 0.6 * ((i + 0.5) / len(groups) - 0.5)
        style = {"color": marks[key].color, "marker": marks[key].marker, "alpha": 0.8}
        x, y = zip(*((e.rank + offset, axis.place(e.importance)) for e in members), strict=True)
        ax.scatter(x, y, s=26, linewidths=0, **style)
    if not axis.log or mean > 0:
        ranks = [0.5 + most * i / 60 for i in range(61)]
        ray = [axis.place(mean * rank) for rank in ranks]
        ax.plot(ranks, ray, color="#333333", linestyle=(0, (5, 3)), linewidth=1.2)
    ax.set_xlim(0.2, most + 0.8)
    ax.set_ylim(*axis.span)
    axis.write(ax)
    whole_ticks(ax, "x", 8)
    ax.set_xlabel("rank: directions kept")
    ax.tick_params(length=0)
    handles = [
        Line2D([], [], color=marks[k].color, marker=marks[k].marker, linestyle="") for k in groups
    ]
    add_legend(drawn, handles, labels, shape, left=10)
    rho = spearman(
        [float(each.rank) for each in kept.values()],
        [each.importance / each.rank for each in kept.values()],
    )
    data = {
        "step": step,
        "points": {key: [[e.rank, e.importance] for e in group] for key, group in groups.items()},
        "mean": mean,
        "spearman": rho,
        "log": axis.log,
    }
    name, title = f"importance-rank{suffix}", "Importance against rank"
    return finish(drawn, name, title, _caption(run.history, step), data, _headline(rho, kept))


def last_importance(history: History) -> tuple[int, dict[str, Kept]] | None:
    """Return what the last decision with importance says of targets that kept directions.

    Args:
        history: The history.

    Returns:
        The decision's step, and rank and importance by target; None if nothing is known.
    """
    for decision in reversed(history.decisions):
        ranks = history.ranks_at(decision.step)
        kept = {
            name: Kept(ranks[name], value if abs(value) > _TINY else 0.0)
            for name, value in decision.importance.items()
            if ranks.get(name, 0) > 0
        }
        if kept:
            return decision.step, kept
    return None


@dataclass(frozen=True, slots=True)
class _Axis:
    """Where an importance is drawn: linear in a power of ten, or logarithmic."""

    log: bool
    exponent: int
    span: tuple[float, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "_Axis":
        low, high = min(values), max(values)
        if low > 0 and high > _SPREAD * low:
            a, b = math.log10(low), math.log10(high)
            return cls(True, 0, (a - 0.06 * (b - a), b + 0.06 * (b - a)))
        size = max(abs(low), abs(high))
        exponent = math.floor(math.log10(size)) if size else 0
        exponent = 0 if -3 < exponent < 4 else exponent
        unit = 10.0**exponent
        a, b = min(0.0, low) / unit, max(0.0, high) / unit
        pad = 0.06 * (b - a) or 1.0
        return cls(False, exponent, (a - pad if a < 0 else a, b + pad))

    def place(self, value: float) -> float:
        if self.log:
            return math.log10(value)
        return value / 10.0**self.exponent

    def write(self, ax: Axes) -> None:
        unit = f", × {power_of_ten(self.exponent)}" if self.exponent else ""
        ax.set_ylabel(f"importance, summed{unit}")
        if self.log:
            log_ticks(ax.yaxis)
            return
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 9), 4)))
        if self.span[0] < 0:
            ax.axhline(0, color="#bbbbbb", linewidth=1)


def _caption(history: History | None, step: int) -> str:
    text = (
        f"Every mark is a target after the decision at step {count(step)}: the scores of the "
        "directions that it kept, summed, in the method's unit. On the broken line a direction is "
        "as important as the average one; targets above it kept better ones. Types are set apart "
        "a little so that none hides another."
    )
    ranks = history.ranks_at(step) if history else {}
    lost = sum(1 for rank in ranks.values() if not rank)
    return f"{text} Not drawn: {plural(lost, 'target')} that kept none." if lost else text


def _headline(rho: float | None, kept: Mapping[str, Kept]) -> str:
    if rho is None:
        return f"{plural(len(kept), 'target')} kept directions; too few or too alike to compare."
    per = "importance per direction"
    if abs(rho) < 0.2:
        says = f"Targets that kept more directions have neither more nor less {per}"
    elif rho > 0:
        says = f"Targets that kept more directions also have more {per}"
    else:
        says = f"Targets that kept more directions have less {per}"
    return f"{says} (Spearman's rank correlation {rho:.2f}).".replace("-0", "−0")
