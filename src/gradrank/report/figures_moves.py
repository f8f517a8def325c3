"""What decisions did to the budget: parameters in use against it, and how much each one moved."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from gradrank.report.figures_time import shown_end
from gradrank.report.history import Event
from gradrank.report.panels import LEFT, WIDTH, step_axis, two_panels
from gradrank.report.pruned import falling
from gradrank.report.style import add_legend, legend_shape, whole_ticks
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, listed, percent, plural
from gradrank.report.view import Run

_USED, _LIMIT, _OVER, _BAR, _ASKED = "#0072B2", "#333333", "#D55E00", "#009E73", "#D55E00"
_BROKEN, _DOTTED = (0, (5, 2)), (0, (1.2, 1.6))


@look()
def budget_course(run: Run, suffix: str = "") -> Figure | None:
    """Draw parameters in use and the budget over steps, and what is left between them.

    Args:
        run: The run.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if parameters are unknown. ``data``: ``used`` and ``budget`` (lists of
        ``[step, parameters]``, each valid until the next), ``slack`` (where both are known) and
        ``over`` (steps above the budget); where the budget falls, ``budget`` is what is allowed
        and ``asked`` what it comes down to.
    """
    history = run.history
    if history is None:
        return None
    points = history.usage
    used = [[step, value] for step, value, _ in points if value is not None]
    budget = [[step, limit] for step, _, limit in points if limit is not None]
    slack = [[s, limit - v] for s, v, limit in points if v is not None and limit is not None]
    if not used:
        return None
    over = [step for step, left in slack if left < 0]
    # What the very last decision left in use is still seen: a fiftieth of the run is added.
    last = points[-1][0]
    end = max(shown_end(run), last + max(1, last // 50))
    asked = history.asked if history.falls else None
    drawn, (upper, lower) = two_panels((170, 110 if slack else 0), 1)
    _course(upper, used, end, color=_USED, linewidth=2.4)
    steps, values = zip(*used, strict=True)
    style = {"color": "#a9cfe8", "linewidth": 0}
    upper.fill_between([*steps, end], [*values, values[-1]], step="post", **style)
    if budget:
        _course(upper, budget, end, color=_LIMIT, linestyle=_BROKEN, linewidth=1.6)
    if asked is not None:
        upper.axhline(asked, color=_ASKED, linestyle=_DOTTED, linewidth=2.2)
    highest = max([asked or 0, *(value for _, value in used + budget)])
    upper.set_ylim(0, 1.12 * max(highest, 1))
    upper.set_ylabel("parameters")
    _legend(drawn, bool(budget), history.falls, asked is not None)
    if slack:
        _slack(lower, slack, end)
    step_axis(upper, lower, (points[0][0], end))
    data: dict[str, Any] = {"used": used, "budget": budget, "slack": slack, "over": over}
    if history.falls:
        data["asked"] = asked
    headline = falling(run) if history.falls else _budget_headline(slack, budget, used)
    name, title = f"budget-over-time{suffix}", "Budget over time"
    caption = _budget_caption(bool(budget), history.falls)
    return finish(drawn, name, title, caption, data, headline)


@look()
def moved_bars(run: Run, suffix: str = "") -> Figure | None:
    """Draw for every decision the parameters moved and the number of targets changed.

    Args:
        run: The run.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if nothing is known to have moved. ``data``: ``moved`` and
        ``changed``, lists of ``[step, number]``; ``taken`` instead of ``moved`` where capacity was
        only taken away.
    """
    history = run.history
    events = history.events if history else ()
    shrinks = history is not None and history.only_shrinks
    worth = [(e.step, e.taken if shrinks else e.moved) for e in events]
    moved = [[step, value] for step, value in worth if value is not None]
    changed = [[event.step, event.changed] for event in events if event.changed is not None]
    if not any(value for _, value in [*moved, *changed]):
        return None
    steps = [event.step for event in events]
    end = max(shown_end(run), steps[-1])
    gap = min((b - a for a, b in pairwise(steps)), default=max(1.0, 0.1 * end))
    drawn, (upper, lower) = two_panels((140, 140))
    verb = "taken" if shrinks else "moved"
    for ax, bars, label, colour in (
        (upper, moved, f"parameters {verb}", _USED),
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
    step_axis(upper, lower, (min(0.0, steps[0] - gap / 2), max(end, steps[-1] + gap / 2)))
    what = "given to targets that grew. Below: targets whose rank changed, up or down."
    title = "Capacity moved by each decision"
    headline = _moved_headline(events)
    if shrinks:
        what = "taken away; none were given. Below: targets that lost rank."
        title, headline = "Capacity taken away by each decision", _taken_headline(events)
    caption = f"One bar per decision. Above: parameters {what}"
    data = {verb: moved, "changed": changed}
    return finish(drawn, f"moved-capacity{suffix}", title, caption, data, headline)


def _budget_caption(budgeted: bool, falls: bool) -> str:
    caption = "Solid: adapter parameters in use."
    if falls:
        allowed = " Broken: what each decision allows." if budgeted else ""
        caption += f"{allowed} Dotted: the budget that was asked for, which binds at the end only."
        return caption + (" Below: what is left of what is allowed." if budgeted else "")
    if budgeted:
        caption += " Broken: the budget. Below: what is left of it; under zero would be too much."
    return caption


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


def _taken_headline(events: Sequence[Event]) -> str:
    most = max(events, key=lambda event: event.taken or 0)
    whole = sum(event.taken or 0 for event in events)
    text = f"The largest decision, at step {count(most.step)}, took {count(most.taken)} parameters"
    if len(events) == 1:
        return f"The only decision, at step {count(most.step)}, took {count(whole)} parameters."
    return f"{text}, {percent((most.taken or 0) / whole)} of all that was taken away."


def _share(event: Event) -> str:
    moved = event.moved or 0
    if not moved:
        return "nothing"
    return (
        f"{percent(moved / event.budget)} of the budget"
        if event.budget
        else f"{count(moved)} parameters"
    )


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


def _legend(drawn: Canvas, budgeted: bool, falls: bool, asked: bool) -> None:
    handles = [Line2D([], [], color=_USED, linewidth=2.4)]
    labels = ["in use"]
    if budgeted:
        handles.append(Line2D([], [], color=_LIMIT, linestyle=_BROKEN, linewidth=1.6))
        labels.append("allowed" if falls else "budget")
    if asked:
        handles.append(Line2D([], [], color=_ASKED, linestyle=_DOTTED, linewidth=2.2))
        labels.append("asked for")
    shape = legend_shape(labels, WIDTH - LEFT, 3)
    add_legend(drawn, handles, labels, shape, left=LEFT - 8, handlelength=3)
