"""What decisions did to the budget: parameters in use against it, and how much each one moved."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from gradrank.report.figures_time import shown_end
from gradrank.report.history import Event
from gradrank.report.style import add_legend, legend_shape, whole_ticks
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, listed, percent, plural
from gradrank.report.view import Run

_WIDTH, _LEFT, _RIGHT = 500, 86, 16
_USED, _LIMIT, _OVER, _BAR = "#0072B2", "#333333", "#D55E00", "#009E73"
_BROKEN = (0, (5, 2))


@look()
def budget_course(run: Run, suffix: str = "") -> Figure | None:
    """Draw parameters in use and the budget over steps, and what is left between them.

    Args:
        run: The run.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if parameters are unknown. ``data``: ``used`` and ``budget`` (lists of
        ``[step, parameters]``, each valid until the next), ``slack`` (where both are known) and
        ``over`` (steps above the budget).
    """
    history = run.history
    if history is None:
        return None
    points = _points(run)
    used = [[step, value] for step, value, _ in points if value is not None]
    budget = [[step, limit] for step, _, limit in points if limit is not None]
    slack = [[s, limit - v] for s, v, limit in points if v is not None and limit is not None]
    if not used:
        return None
    over = [step for step, left in slack if left < 0]
    end = max(shown_end(run), points[-1][0])
    drawn, (upper, lower) = _two_panels((170, 110 if slack else 0), 1 + bool(budget))
    _course(upper, used, end, color=_USED, linewidth=2.4)
    steps, values = zip(*used, strict=True)
    style = {"color": "#a9cfe8", "linewidth": 0}
    upper.fill_between([*steps, end], [*values, values[-1]], step="post", **style)
    if budget:
        _course(upper, budget, end, color=_LIMIT, linestyle=_BROKEN, linewidth=1.6)
    highest = max(value for _, value in used + budget)
    upper.set_ylim(0, 1.12 * max(highest, 1))
    upper.set_ylabel("parameters")
    _legend(drawn, budgeted=bool(budget))
    if slack:
        _slack(lower, slack, end)
    _axis(upper if not slack else lower, (points[0][0], end))
    _same_axis(upper, lower)
    caption = "Solid: adapter parameters in use. "
    if budget:
        caption += "Broken: the budget. Below: what is left of it; under zero would be too much."
    data = {"used": used, "budget": budget, "slack": slack, "over": over}
    name, title = f"budget-over-time{suffix}", "Budget over time"
    return finish(drawn, name, title, caption.strip(), data, _budget_headline(slack, budget, used))


@look()
def moved_bars(run: Run, suffix: str = "") -> Figure | None:
    """Draw for every decision the parameters moved and the number of targets changed.

    Args:
        run: The run.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if nothing is known to have moved. ``data``: ``moved`` and
        ``changed``, lists of ``[step, number]``.
    """
    events = run.history.events if run.history else ()
    moved = [[event.step, event.moved] for event in events if event.moved is not None]
    changed = [[event.step, event.changed] for event in events if event.changed is not None]
    if not any(value for _, value in [*moved, *changed]):
        return None
    steps = [event.step for event in events]
    end = max(shown_end(run), steps[-1])
    gap = min((b - a for a, b in pairwise(steps)), default=max(1.0, 0.1 * end))
    drawn, (upper, lower) = _two_panels((140, 140), 0)
    for ax, bars, label, colour in (
        (upper, moved, "parameters moved", _USED),
        (lower, changed, "targets changed", _BAR),
    ):
        if bars:
            ax.bar(*zip(*bars, strict=True), width=0.72 * gap, color=colour, linewidth=0)
        ax.set_ylim(0, 1.1 * max([1, *(value for _, value in bars)]))
        ax.set_ylabel(label)
        ax.grid(axis="x", visible=False)
        whole_ticks(ax, "y", 4)
        ax.yaxis.set_major_formatter(lambda value, _: count(value))
        if not bars:
            ax.text(0.5, 0.5, "not known", transform=ax.transAxes, ha="center", color="#555555")
    _axis(lower, (min(0.0, steps[0] - gap / 2), max(end, steps[-1] + gap / 2)))
    _same_axis(upper, lower)
    caption = (
        "One bar per decision. Above: parameters given to targets that grew. Below: targets whose "
        "rank changed, up or down."
    )
    data = {"moved": moved, "changed": changed}
    name, title = f"moved-capacity{suffix}", "Capacity moved by each decision"
    return finish(drawn, name, title, caption, data, _moved_headline(events))


def _points(run: Run) -> list[tuple[int, int | None, int | None]]:
    """Return ``(step, parameters, budget)``, the start first.

    Before the first decision the budget is known only if it never changes.
    """
    history = run.history
    if history is None:
        return []
    points = [(e.step, e.parameters, e.budget) for e in history.events]
    if history.ranks and history.ranks[0][0] < (points[0][0] if points else 1):
        step, ranks = history.ranks[0]
        limits = {limit for _, _, limit in points}
        if history.budget is not None:
            limits.add(history.budget)
        points.insert(0, (step, history.cost_of(ranks), limits.pop() if len(limits) == 1 else None))
    return points


def _budget_headline(
    slack: Sequence[Sequence[int]], budget: Sequence[Sequence[int]], used: Sequence[Sequence[int]]
) -> str:
    if not slack:
        low, high = min(v for _, v in used), max(v for _, v in used)
        return f"Between {count(low)} and {count(high)} parameters are in use; no budget is known."
    over = [(step, -left) for step, left in slack if left < 0]
    if over:
        steps = listed(count(step) for step, _ in over[:3])
        more = f" and {count(len(over) - 3)} more" if len(over) > 3 else ""
        word = "steps" if len(over) > 1 else "step"
        most = count(max(excess for _, excess in over))
        return f"Over the budget at {word} {steps}{more}, by up to {most} parameters."
    limits = {step: limit for step, limit in budget if limit}
    share = max((left / limits[step] for step, left in slack if step in limits), default=0)
    if not share:
        return "The budget is never exceeded and always spent to the last parameter."
    return f"The budget is never exceeded; at most {percent(share)} of it is left unused."


def _moved_headline(events: Sequence[Event]) -> str:
    known = [event for event in events if event.moved is not None]
    moving = [event for event in known if event.moved]
    if not moving:
        told = [event for event in events if event.changed]
        most = max(told, key=lambda event: event.changed or 0)
        who = plural(most.changed or 0, "target")
        return f"The largest decision, at step {count(most.step)}, changed {who}."
    most = max(moving, key=lambda event: event.moved or 0)
    text = f"The largest decision, at step {count(most.step)}, moved {_share(most)}"
    if len(known) == 1:
        return f"The only decision, at step {count(most.step)}, moved {_share(most)}."
    return f"{text}; the last one, at step {count(known[-1].step)}, {_share(known[-1])}."


def _share(event: Event) -> str:
    moved = event.moved or 0
    if not moved:
        return "nothing"
    return (
        f"{percent(moved / event.budget)} of the budget"
        if event.budget
        else f"{count(moved)} parameters"
    )


def _two_panels(tall: tuple[int, int], lines: int) -> tuple[Canvas, tuple[Axes, Axes]]:
    head, gap, foot = (10 + 20 * bool(lines)), 16 * bool(tall[1]), 44
    height = head + sum(tall) + gap + foot
    drawn = canvas(_WIDTH, height)
    left, wide = _LEFT / _WIDTH, (_WIDTH - _LEFT - _RIGHT) / _WIDTH
    low = max(tall[1], 1)
    upper = drawn.add_axes((left, (foot + tall[1] + gap) / height, wide, tall[0] / height))
    lower = drawn.add_axes((left, foot / height, wide, low / height))
    lower.set_visible(bool(tall[1]))
    for ax in (upper, lower):
        ax.tick_params(length=0)
        ax.yaxis.set_major_formatter(lambda value, _: count(value).replace("-", "−"))
    return drawn, (upper, lower)


def _course(ax: Axes, points: Sequence[Sequence[int]], end: int, **style: Any) -> None:
    steps, values = zip(*points, strict=True)
    ax.step([*steps, end], [*values, values[-1]], where="post", **style)


def _slack(ax: Axes, slack: Sequence[Sequence[int]], end: int) -> None:
    steps, left = zip(*slack, strict=True)
    x, y = [*steps, end], [*left, left[-1]]
    ax.fill_between(x, [max(v, 0) for v in y], step="post", color="#a9cfe8", linewidth=0)
    if min(y) < 0:
        under = [min(v, 0) for v in y]
        style = {"facecolor": _OVER, "hatch": "///", "edgecolor": "white", "linewidth": 0}
        ax.fill_between(x, under, step="post", **style)
    ax.step(x, y, where="post", color=_USED, linewidth=1.6)
    ax.axhline(0, color=_LIMIT, linewidth=1.6, linestyle=_BROKEN)
    high, low = max([1, *y]), min([0, *y])
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    ax.set_ylabel("left over")
    whole_ticks(ax, "y", 4)


def _axis(ax: Axes, span: tuple[float, float]) -> None:
    ax.set_xlim(span[0], span[1] if span[1] > span[0] else span[0] + 1)
    ax.set_xlabel("step")
    whole_ticks(ax, "x", 6)
    ax.xaxis.set_major_formatter(lambda value, _: count(value))


def _same_axis(upper: Axes, lower: Axes) -> None:
    """Give the upper panel the steps of the lower one, without repeating its labels."""
    if lower.get_visible():
        upper.set_xlim(lower.get_xlim())
        whole_ticks(upper, "x", 6)
        upper.tick_params(labelbottom=False)


def _legend(drawn: Canvas, budgeted: bool) -> None:
    handles = [Line2D([], [], color=_USED, linewidth=2.4)]
    labels = ["in use"]
    if budgeted:
        handles.append(Line2D([], [], color=_LIMIT, linestyle=_BROKEN, linewidth=1.6))
        labels.append("budget")
    shape = legend_shape(labels, _WIDTH - _LEFT, 3)
    add_legend(drawn, handles, labels, shape, left=_LEFT - 8, handlelength=3)
