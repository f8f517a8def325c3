"""Training: loss curves, and the difference to uniform that they are read for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from gradrank.report.style import add_legend, label_of, legend_shape, run_marks, whole_ticks
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import signed
from gradrank.report.view import BASELINE, Run

# Enough for a curve a thousand pixels wide, and the page stays light after a long run.
MAX_POINTS = 400
_WIDTH, _HEIGHT, _LEFT, _RIGHT = 500, 330, 62, 14


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[list[float]]:
    """Average neighbouring points until few enough are left.

    Args:
        points: ``(step, loss)``, in order.
        most: Greatest number of points of the result.

    Returns:
        ``[step, loss]`` pairs; the points themselves if they are few.

    Examples:
        >>> thin([(1, 4.0), (2, 2.0), (3, 1.0), (4, 0.0)], 2)
        [[1.5, 3.0], [3.5, 0.5]]
    """
    if len(points) <= most:
        return [[step, loss] for step, loss in points]
    groups = np.array_split(np.array(points, dtype=float), most)
    return [[float(value) for value in group.mean(axis=0)] for group in groups]


def smooth(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return a centred moving average over a tenth of the curve.

    Args:
        points: ``[step, loss]`` pairs.

    Returns:
        As many pairs; near the ends the window is cut, not padded.
    """
    half = max(1, len(points) // 20)
    losses = np.array([loss for _, loss in points], dtype=float)
    return [
        [step, float(losses[max(0, i - half) : i + half + 1].mean())]
        for i, (step, _) in enumerate(points)
    ]


@look()
def loss_curves(runs: Sequence[Run]) -> Figure | None:
    """Draw training loss (light, and smoothed) and evaluation loss (strong) of every run.

    Args:
        runs: The runs.

    Returns:
        The figure, or None if no loss is known. ``data``: per run ``train``, ``smoothed`` and
        ``eval``, each a list of ``[step, loss]``.
    """
    data: dict[str, Any] = {}
    for run in runs:
        train = thin(run.train)
        smoothed = smooth(train) if len(train) >= 20 else []
        if train or run.evals:
            curves = {"train": train, "smoothed": smoothed, "eval": thin(run.evals)}
            data[label_of(run)] = curves
    if not data:
        return None
    marks = {label_of(run): mark for run in runs for mark in [run_marks(runs)[run.label]]}
    drawn, ax = _axes(list(data))
    for label, curves in data.items():
        mark = marks[label]
        for key, width, alpha, dot in (
            ("train", 0.9, 0.28, None),
            ("smoothed", 1.5, 0.75, None),
            ("eval", 2.4, 1.0, mark.marker),
        ):
            if curves[key]:
                line = mark.line if key != "train" else "-"
                style = {"color": mark.color, "linestyle": line, "marker": dot, "markersize": 6}
                ax.plot(*zip(*curves[key], strict=True), lw=width, alpha=alpha, **style)
    _frame(ax, [pair for c in data.values() for pair in c["smoothed"] + c["eval"]])
    _legend(drawn, {label: marks[label] for label in data})
    ax.set_ylabel("loss (nats per predicted item)")
    caption = (
        "Strong lines with marks: held-out loss. Thin lines: training loss, as it came (faint) and "
        "averaged over a tenth of the run. Lower is better."
    )
    return finish(drawn, "loss", "Loss", caption, data)


@look()
def loss_difference(runs: Sequence[Run]) -> Figure | None:
    """Draw evaluation loss relative to uniform, at the steps that both have.

    Finished runs are compared with the uniform run of the same seed if there is one, else with
    the first.

    Args:
        runs: The runs.

    Returns:
        The figure, or None without a uniform run or without common steps. ``data``: per run a
        list of ``[step, difference]``.
    """
    finished = [run for run in runs if run.finished and run.evals]
    bases = [run for run in finished if run.method == BASELINE]
    data: dict[str, list[list[float]]] = {}
    for run in finished:
        if run.method != BASELINE and bases:
            base = dict(next((b for b in bases if b.seed == run.seed), bases[0]).evals)
            common = [[step, loss - base[step]] for step, loss in run.evals if step in base]
            if len(common) >= 2:
                data[label_of(run)] = common
    if not data:
        return None
    marks = {label_of(run): mark for run in runs for mark in [run_marks(runs)[run.label]]}
    drawn, ax = _axes(list(data))
    for label, points in data.items():
        mark = marks[label]
        style = {"color": mark.color, "linestyle": mark.line, "marker": mark.marker}
        ax.plot(*zip(*points, strict=True), linewidth=2.2, **style)
    ax.axhline(0, color="#6b6b6b", linewidth=1.4)
    ax.annotate(
        "uniform",
        (1, 0),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color="#555555",
    )
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.3g}".replace("-", "−"))
    _legend(drawn, {label: marks[label] for label in data})
    ax.set_ylabel("held-out loss − uniform's (nats)")
    ends = ", ".join(f"{label} {signed(points[-1][1])}" for label, points in data.items())
    caption = f"Below the line is better than uniform. At the last common step: {ends} nats."
    return finish(drawn, "loss-difference", "Difference to uniform", caption, data)


def _axes(labels: Sequence[str]) -> tuple[Any, Any]:
    width = float(_WIDTH)
    head = 12 + 19 * legend_shape(labels, width - _LEFT, 3)[0]
    height = float(_HEIGHT + head)
    drawn = canvas(width, height)
    box = (_LEFT / width, 42 / height, (width - _LEFT - _RIGHT) / width, (_HEIGHT - 50) / height)
    ax = drawn.add_axes(box)
    ax.set_xlabel("step")
    ax.tick_params(length=0)
    whole_ticks(ax, "x", 7)
    return drawn, ax


def _frame(ax: Any, points: Sequence[Sequence[float]]) -> None:
    """Fit the view to what is strong; one wild training step must not flatten everything."""
    if len(points) > 1:
        losses = [loss for _, loss in points]
        low, high = min(losses), max(losses)
        size = max(abs(low), abs(high), 1.0)
        margin = 0.08 * (high - low if high - low > 1e-9 * size else size)
        ax.set_ylim(low - margin, high + margin)


def _legend(drawn: Any, marks: dict[str, Any]) -> None:
    handles = [
        Line2D([], [], color=m.color, linestyle=m.line, marker=m.marker, markersize=5, lw=2)
        for m in marks.values()
    ]
    shape = legend_shape(list(marks), _WIDTH - _LEFT, 3)
    add_legend(drawn, handles, list(marks), shape, left=_LEFT - 8, handlelength=3)
