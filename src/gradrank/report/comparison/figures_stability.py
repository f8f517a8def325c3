"""How far plans of different calibration seeds agree."""

from typing import Any

from gradrank.evidence.comparison import Stability
from gradrank.report.comparison.strips import Strip, drawable, gapped, strips
from gradrank.report.comparison.view import View, in_order, label, slug
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import as_float


@look()
def stability_figure(view: View, task: str, position: int) -> Figure | None:
    """Draw the agreement of plans on one task, one panel per budget.

    Args:
        view: The comparison.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The figure, or None without plans to compare. ``data``: per budget and method ``mean``,
        ``low`` and ``high``.
    """
    own = [
        each
        for each in view.source.stability
        if each.task == task and as_float(each.mean) is not None
    ]
    if not own:
        return None
    budgets = in_order((s.budget for s in own), [info.text for info in view.source.budgets])
    methods = in_order((s.method for s in own), view.source.methods)
    panels = {b: sorted((s for s in own if s.budget == b), key=_by(methods)) for b in budgets}
    frames = [Strip(f"budget {label(b, 40)}", [s.method for s in panels[b]]) for b in budgets]
    x_label = "Spearman's correlation of the ranks of two plans"
    drawn, axes = strips(view, frames, [x_label])
    for ax, group in zip(axes, panels.values(), strict=True):
        known = [(i, s) for i, s in enumerate(group) if None not in {s.low, s.high}]
        along, across = gapped([_ends(s) for _, s in known], [i for i, _ in known])
        ax.plot(along, across, color="#0072B2", linewidth=1.6)
        style: dict[str, Any] = {"marker": "o", "color": "#0072B2", "markersize": 6}
        ax.plot(drawable(s.mean for s in group), range(len(group)), linestyle="", **style)
        ax.axvline(0, color="#222222", linewidth=1)
    lows = [s.low for s in own if s.low is not None]
    axes[0].set_xlim(min([-0.15, *(low - 0.05 for low in lows)]), 1.04)
    caption = (
        "Only the data that was measured on differs between the plans. 1: the same order of ranks "
        "every time; 0: no more alike than chance. Lines reach from the least to the most alike "
        "pair."
    )
    data = {b: {s.method: _drawn(s) for s in group} for b, group in panels.items()}
    title = f"Agreement of plans: {label(task)}"
    return finish(drawn, f"stability-{slug(position, task)}", title, caption, data, tall=False)


def _by(methods: list[str]) -> Any:
    return lambda each: methods.index(each.method)


def _ends(each: Stability) -> tuple[float, float]:
    return (each.low or 0.0, each.high or 0.0)


def _drawn(each: Stability) -> dict[str, Any]:
    return {"mean": each.mean, "low": each.low, "high": each.high, "pairs": each.pairs}
