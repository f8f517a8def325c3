"""Whether attributions add up to the change of the loss that they should explain."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradrank.report.figures_time import shown_end
from gradrank.report.history import Decision
from gradrank.report.panels import LEFT, WIDTH, step_axis, two_panels
from gradrank.report.pruned import gaps, relative, tolerance
from gradrank.report.style import add_legend, legend_shape
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, number, percent, plural, power_of_ten
from gradrank.report.view import Run

_TOLD, _ACTUAL, _LARGE, _LINE = "#0072B2", "#333333", "#D55E00", "#777777"
_BROKEN = (0, (4, 2))
# Gaps above this many times the tolerance need a logarithmic axis.
_WIDE = 12
_LEAST = 1e-6


@look()
def completeness(run: Run, suffix: str = "") -> Figure | None:
    """Draw attributed against actual change of the loss, and the gap between them.

    Args:
        run: The run.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if no gap is known. ``data``: ``attributed`` and ``loss_change``
        (lists of ``[step, nats]``), ``gap`` (lists of ``[step, relative gap]``) and ``tolerance``.
    """
    known = gaps(run)
    if not known:
        return None
    told = [[d.step, d.attributed] for d, _ in known if d.attributed is not None]
    actual = [[d.step, d.loss_change] for d, _ in known if d.loss_change is not None]
    bound = tolerance(run)
    drawn, (upper, lower) = two_panels((150, 130), 1)
    if told or actual:
        _changes(upper, told, actual)
    else:
        upper.text(0.5, 0.5, "not known", transform=upper.transAxes, ha="center", color="#555555")
        upper.set_yticks([])
    upper.set_ylabel("nats")
    _gaps(lower, [[float(d.step), gap] for d, gap in known], bound)
    last = known[-1][0].step
    margin = max(1.0, 0.03 * last)
    step_axis(upper, lower, (-margin, max(shown_end(run), last) + margin))
    _legend(drawn, len(known))
    data = {
        "attributed": told,
        "loss_change": actual,
        "gap": [[d.step, gap] for d, gap in known],
        "tolerance": bound,
    }
    caption = (
        "Above: the sum of all attributions against what the adapter really changes the loss by; "
        "where the two lie on each other, the attributions explain all of it. Below: their "
        f"distance relative to the change. The broken line is {_named_bound(run)}."
    )
    title = "Do the attributions add up?"
    return finish(drawn, f"completeness{suffix}", title, caption, data, _headline(known, bound))


def _changes(ax: Axes, told: Sequence[Sequence], actual: Sequence[Sequence[Any]]) -> None:
    dense = max(len(told), len(actual)) > 40
    for points, style in zip((actual, told), _styles(dense), strict=True):
        if points:
            ax.plot(*zip(*points, strict=True), **style)
    values = [value for _, value in [*told, *actual]]
    low, high = min(0.0, *values), max(0.0, *values)
    pad = 0.12 * (high - low) or 1.0
    ax.set_ylim(low - pad, high + pad)
    ax.axhline(0, color="#bbbbbb", linewidth=1)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(_rounded(value, pad), 3)))


def _styles(dense: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how the actual change and the attributed one are drawn."""
    actual = {"color": _ACTUAL, "marker": None if dense else "s", "markersize": 5}
    told = {"color": _TOLD, "marker": None if dense else "o", "markersize": 4.5}
    return (
        {**actual, "linewidth": 1.4, "linestyle": _BROKEN, "markerfacecolor": "white"},
        {**told, "linewidth": 2},
    )


def _gaps(ax: Axes, points: Sequence[Sequence[float]], bound: float) -> None:
    """Draw gaps and the tolerance, on a logarithmic axis where they lie far apart."""
    most = max(gap for _, gap in points)
    wide = most > _WIDE * bound
    least = max(_LEAST, min([bound, *(gap for _, gap in points if gap > 0)]))

    def place(gap: float) -> float:
        return math.log10(max(gap, least)) if wide else gap

    ax.plot([s for s, _ in points], [place(g) for _, g in points], color=_LINE, linewidth=1)
    within: dict[str, Any] = {"marker": "o", "color": _TOLD}
    for large, style in ((False, within), (True, _large())):
        some = [(step, place(gap)) for step, gap in points if (gap > bound) == large]
        if some:
            ax.plot(*zip(*some, strict=True), linestyle="", markersize=6, **style)
    ax.axhline(place(bound), color=_ACTUAL, linewidth=1.4, linestyle=_BROKEN)
    low, high = (place(least) if wide else 0.0), place(max(most, 1.5 * bound))
    pad = 0.1 * max(high - low, 1e-9)
    ax.set_ylim(low - pad, high + pad)
    ax.set_ylabel("gap")
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=wide, min_n_ticks=1))
    ax.yaxis.set_major_formatter(FuncFormatter(_powers if wide else lambda v, _: percent(v)))


def _powers(value: float, _: int | None) -> str:
    exponent = round(value)
    if exponent <= 0:
        return percent(10.0**exponent)
    return f"{10**exponent}×" if exponent < 4 else f"{power_of_ten(exponent)}×"


def _large() -> dict[str, Any]:
    return {"marker": "X", "color": _LARGE, "markeredgecolor": "white", "markeredgewidth": 0.5}


def _legend(drawn: Canvas, decisions: int) -> None:
    actual, told = _styles(decisions > 40)
    handles = [
        Line2D([], [], **told),
        Line2D([], [], **actual),
        Line2D([], [], linestyle="", markersize=7, **_large()),
    ]
    labels = ["attributed", "actual change", "gap too large"]
    shape = legend_shape(labels, WIDTH - LEFT + 60, 3)
    add_legend(drawn, handles, labels, shape, left=LEFT - 60, handlelength=3)


def _named_bound(run: Run) -> str:
    told = run.history is not None and run.history.tolerance is not None
    text = percent(tolerance(run))
    return f"the method's tolerance, {text}" if told else f"{text}; no tolerance is recorded"


def _headline(known: Sequence[tuple[Decision, float]], bound: float) -> str:
    large = [gap for _, gap in known if gap > bound]
    step, most = max(((d.step, gap) for d, gap in known), key=lambda pair: pair[1])
    whole = plural(len(known), "decision")
    if not large:
        every = "At the only decision" if len(known) == 1 else f"At all {whole}"
        return f"{every} the gap is within {percent(bound)}; at most it is {relative(most)}."
    where = f"at {count(len(large))} of {whole}" if len(known) > 1 else "at the only decision"
    return (
        f"The gap is above {percent(bound)} {where}; the largest is {relative(most)}, at step "
        f"{count(step)}."
    )


def _rounded(value: float, pad: float) -> float:
    """Return a tick's value without the last bits that would be written out."""
    return 0.0 if abs(value) < 1e-9 * pad else value
