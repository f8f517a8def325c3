"""Courses over time, one panel per module type: ranks, and the effective ranks behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradrank.report.figures_time import shown_end
from gradrank.report.layout import Layout
from gradrank.report.panels import MAX_PANELS, small_multiples
from gradrank.report.style import whole_ticks
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, number, plural
from gradrank.report.timemap import evenly
from gradrank.report.view import Run

MAX_POINTS = 300
_MEAN, _BAND, _SMOOTHED = "#0072B2", "#a9cfe8", "#D55E00"
_BROKEN = (0, (4, 2))


@look()
def rank_courses(run: Run, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw the mean rank of each module type over steps, with the span of its targets.

    Args:
        run: The run.
        layout: Gives the module types.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None without ranks. ``data``: per module type ``steps``, ``mean``, ``low``
        and ``high``.
    """
    history = run.history
    if history is None or not history.targets:
        return None
    kept = [history.ranks[i] for i in evenly(len(history.ranks), MAX_POINTS)]
    filled = [(step, {n: float(r.get(n, 0)) for n in history.targets}) for step, r in kept]
    every = _courses(filled, layout)
    shown = dict(list(every.items())[:MAX_PANELS])
    end = max(shown_end(run), kept[-1][0])
    top = max(max(course["high"]) for course in shown.values())

    def draw(ax: Axes, title: str) -> None:
        course = {key: [*part, part[-1]] for key, part in shown[title].items()}
        steps = [*course["steps"][:-1], end]
        ax.fill_between(steps, course["low"], course["high"], step="post", color=_BAND, lw=0)
        ax.step(steps, course["mean"], where="post", color=_MEAN, linewidth=2)
        _frame(ax, (kept[0][0], end), top)

    handles = [Line2D([], [], color=_MEAN, linewidth=2), Patch(facecolor=_BAND)]
    legend = (handles, ["mean rank", "lowest to highest"])
    drawn = small_multiples(list(shown), draw, "step", "rank", legend)
    caption = (
        "One panel per module type; rank 0 counts, so a dropped target lowers the mean."
        + _dropped_note(every)
    )
    title, name = "Ranks over time by module type", f"ranks-by-type-over-time{suffix}"
    return finish(drawn, name, title, caption, shown, _extremes(every))


@look()
def effective_courses(run: Run, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw the effective rank of each module type over decisions: of the window, and smoothed.

    Args:
        run: The run.
        layout: Gives the module types.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None without effective ranks. ``data``: per module type ``window`` and, if
        told, ``smoothed``, each with ``steps``, ``mean``, ``low`` and ``high``.
    """
    decisions = run.history.decisions if run.history else ()
    kept = [decisions[i] for i in evenly(len(decisions), MAX_POINTS)]
    window = _courses([(d.step, d.effective_rank) for d in kept], layout)
    smoothed = _courses([(d.step, d.smoothed) for d in kept], layout)
    if not window:
        return None
    data: dict[str, Any] = {
        row: {"window": course, **({"smoothed": smoothed[row]} if row in smoothed else {})}
        for row, course in list(window.items())[:MAX_PANELS]
    }
    top = max(max(c["high"]) for courses in data.values() for c in courses.values())
    span = (0, max(shown_end(run), kept[-1].step))
    dense = len(kept) > 40

    def draw(ax: Axes, title: str) -> None:
        _draw_effective(ax, data[title], dense)
        _frame(ax, span, top)

    legend = _effective_legend(bool(smoothed), dense)
    drawn = small_multiples(list(data), draw, "step", "effective rank", legend)
    caption = (
        "How many directions over a window's mini-batches hold most of a target's gradient energy."
    )
    if smoothed:
        caption += " Ranks are allocated by the smoothed values (broken line)."
    caption += _dropped_note(window)
    title, name = "Effective rank over time", f"effective-rank-over-time{suffix}"
    headline = _effective_headline([(d.step, d.effective_rank) for d in decisions])
    return finish(drawn, name, title, caption, data, headline)


def _effective_styles(dense: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how a window's mean and the smoothed mean are drawn; many points carry no marks."""
    window = {"color": _MEAN, "marker": None if dense else "o", "markersize": 4}
    smoothed = {"color": _SMOOTHED, "marker": None if dense else "D", "markersize": 3.5}
    return (
        {**window, "linewidth": 1.2 if dense else 2},
        {**smoothed, "linewidth": 1.6, "linestyle": _BROKEN},
    )


def _draw_effective(ax: Axes, courses: Mapping[str, Any], dense: bool) -> None:
    window, smoothed = _effective_styles(dense)
    course = courses["window"]
    steps = course["steps"]
    ax.fill_between(steps, course["low"], course["high"], color=_BAND, lw=0)
    if len(steps) == 1:
        ax.vlines(steps, course["low"], course["high"], color=_BAND, linewidth=9)
    ax.plot(steps, course["mean"], **window)
    if "smoothed" in courses:
        ax.plot(courses["smoothed"]["steps"], courses["smoothed"]["mean"], **smoothed)


def _effective_legend(has_smoothed: bool, dense: bool) -> tuple[list[Any], list[str]]:
    window, smoothed = _effective_styles(dense)
    handles: list[Any] = [Line2D([], [], **window), Patch(facecolor=_BAND)]
    labels = ["mean of the window", "lowest to highest"]
    if has_smoothed:
        handles.append(Line2D([], [], **smoothed))
        labels.append("mean, smoothed over decisions")
    return handles, labels


def _courses(
    points: Sequence[tuple[int, Mapping[str, float]]], layout: Layout
) -> dict[str, dict[str, list[float]]]:
    """Return ``{type: {"steps", "mean", "low", "high"}}``, types in model order."""
    result: dict[str, dict[str, list[float]]] = {}
    for step, values in points:
        groups: dict[str, list[float]] = {}
        for name, value in values.items():
            groups.setdefault(layout.row_of(name), []).append(value)
        for row, group in groups.items():
            course = result.setdefault(row, {"steps": [], "mean": [], "low": [], "high": []})
            course["steps"].append(step)
            course["mean"].append(sum(group) / len(group))
            course["low"].append(min(group))
            course["high"].append(max(group))
    return {row: result[row] for row in layout.rows if row in result}


def _frame(ax: Axes, span: tuple[float, float], top: float) -> None:
    low, high = span
    margin = 0.03 * (high - low) or 1.0
    # Every course is drawn on the same stretch of steps, whenever its first decision was.
    ax.set_xlim(low - margin, high + margin)
    ax.set_ylim(0, 1.08 * max(top, 1.0))
    whole_ticks(ax, "x", 4)
    whole_ticks(ax, "y", 5)
    ax.xaxis.set_major_formatter(lambda value, _: count(value))


def _extremes(every: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Say which module type's mean rank rose most and which fell most."""
    change = {row: course["mean"][-1] - course["mean"][0] for row, course in every.items()}
    top, low = max(change, key=change.__getitem__), min(change, key=change.__getitem__)
    parts = []
    for row, verb, moved in ((top, "rose", change[top] > 0), (low, "fell", change[low] < 0)):
        if moved:
            ends = [number(every[row]["mean"][i], 3) for i in (0, -1)]
            most = " most" if len(every) > 1 else ""
            parts.append(f"{row} {verb}{most}, from mean rank {ends[0]} to {ends[1]}")
    return f"{'; '.join(parts)}." if parts else "No module type ended with another mean rank."


def _effective_headline(points: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    known = [(step, sum(v.values()) / len(v)) for step, v in points if v]
    (first, before), (last, after) = known[0], known[-1]
    if first == last:
        return f"The mean over all targets is {number(before, 3)} at step {count(first)}."
    if number(before, 3) == number(after, 3):
        return (
            f"The mean over all targets is {number(before, 3)} at step {count(first)} and at step "
            f"{count(last)}."
        )
    return (
        f"The mean over all targets went from {number(before, 3)} at step {count(first)} to "
        f"{number(after, 3)} at step {count(last)}."
    )


def _dropped_note(every: Mapping[str, Any]) -> str:
    left = len(every) - MAX_PANELS
    return f" {plural(left, 'further module type')} not drawn." if left > 0 else ""
