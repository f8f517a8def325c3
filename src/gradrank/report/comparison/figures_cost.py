"""What methods cost beside the reference: training time, calibration, memory."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from gradrank.report.comparison.strips import Strip, gapped, strips
from gradrank.report.comparison.view import Row, View, label
from gradrank.report.style import percent_ticks
from gradrank.report.svg import Figure, finish, look

_NAMES = {
    "training": "Training time",
    "calibration": "Calibration time",
    "memory": "Peak memory",
}
_SPAN = "#56B4E9"
_CAPTIONS = {
    "training": (
        "Wall time of training alone. It depends on the machine and on what else ran there, so "
        "compare methods of one grid only."
    ),
    "calibration": "Wall time of what a method measures before it trains.",
    "memory": "Most memory in use while training.",
}


def relative_costs(view: View) -> dict[str, dict[str, list[float]]]:
    """Return costs relative to the reference of the same task and budget.

    Args:
        view: The comparison.

    Returns:
        For ``training``, ``calibration`` and ``memory`` a list of ratios per method, one for each
        task and budget where both are known; what nobody knows is left out.
    """
    base = {(r.task, r.budget): r for r in view.rows if r.method == view.reference}
    found: dict[str, dict[str, list[float]]] = {}
    for row in view.rows:
        other = base.get((row.task, row.budget))
        if other is None:
            continue
        for what, ratio in _ratios(row, other).items():
            if ratio is not None:
                found.setdefault(what, {}).setdefault(row.method, []).append(ratio)
    return {what: found[what] for what in _NAMES if what in found}


def _ratios(row: Row, base: Row) -> dict[str, float | None]:
    trained, held = base.average("train_seconds"), base.average("peak_memory_bytes")
    return {
        "training": _over(row.average("train_seconds"), trained),
        "calibration": _over(row.average("calibration_seconds"), trained),
        "memory": _over(row.average("peak_memory_bytes"), held),
    }


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


@look()
def cost_figures(view: View) -> list[Figure]:
    """Draw costs relative to the reference, one figure per kind of cost.

    Args:
        view: The comparison.

    Returns:
        The figures, as far as costs are known. ``data``: ratios by method, from
        :func:`relative_costs`.
    """
    return [_figure(view, what, ratios) for what, ratios in relative_costs(view).items()]


def _figure(view: View, what: str, ratios: Mapping[str, Sequence[float]]) -> Figure:
    base = label(view.reference, 24)
    methods = [method for method in view.methods if method in ratios]
    middle: dict[str, Any] = {"marker": "D", "color": "#222222", "markersize": 6}
    handles = [
        Line2D([], [], color=_SPAN, linewidth=3),
        Line2D([], [], linestyle="", **middle),
    ]
    legend = (handles, ["all tasks and budgets", "median"])
    unit = f"share of {base}'s training time" if what == "calibration" else f"times {base}"
    drawn, (ax,) = strips(view, [Strip("", methods)], [unit], legend, right=24)
    _spans(ax, [ratios[method] for method in methods], middle)
    _dress(ax, what)
    return finish(drawn, f"cost-{what}", _NAMES[what], _CAPTIONS[what], ratios, tall=False)


def _spans(ax: Axes, ratios: Sequence[Sequence[float]], middle: Any) -> None:
    along, across = gapped([(min(each), max(each)) for each in ratios], range(len(ratios)))
    ax.plot(along, across, color=_SPAN, linewidth=3)
    ax.plot([median(each) for each in ratios], range(len(ratios)), linestyle="", **middle)


def _dress(ax: Axes, what: str) -> None:
    low, high = ax.get_xlim()
    if what == "calibration":
        ax.set_xlim(min(0.0, -0.03 * high), high)
        percent_ticks(ax.xaxis)
        return
    ax.axvline(1, color="#222222", linewidth=1)
    ax.set_xlim(min(low, 0.9), max(high, 1.1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
