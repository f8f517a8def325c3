"""Scores: how they became ranks, and whether two halves of the data agree on them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.lines import Line2D

from gradrank.report.figures_ranks import MAX_ALLOCATIONS
from gradrank.report.layout import Layout
from gradrank.report.style import (
    add_legend,
    label_of,
    legend_shape,
    run_marks,
    safe,
    type_key,
    type_marks,
    whole_ticks,
)
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import as_float, listed
from gradrank.report.view import Run, final


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; ties share their mean rank.

    Args:
        x: Values, ``[n]``.
        y: Values, ``[n]``.

    Returns:
        The correlation in [-1, 1]; None for fewer than three points or when one side is
        constant, where it is not defined.

    Source:
        Spearman, 1904: Pearson's correlation of the ranks.

    Examples:
        >>> spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 20.0, 90.0])
        0.9486832980505138
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    a, b = _mean_ranks(x), _mean_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def _mean_ranks(values: Sequence[float]) -> np.ndarray:
    _, where, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where]


@look()
def score_against_rank(runs: Sequence[Run], layout: Layout) -> Figure | None:
    """Draw rank over score, one panel per run that has scores.

    Args:
        runs: The runs.
        layout: Gives the module types.

    Returns:
        The figure, or None without scores. ``data``: per run ``points`` (by module type, lists of
        ``[score, rank]``) and ``spearman``.
    """
    marks = type_marks(layout.rows)
    data = {}
    for run in runs:
        points: dict[str, list[list[float]]] = {}
        for name, entry in run.planned.items():
            if entry.score is not None:
                key = type_key(layout.row_of(name), marks)
                points.setdefault(key, []).append([entry.score, entry.rank])
        # Methods that know nothing before training plan by equal scores, which explain no rank.
        told = {pair[0] for group in points.values() for pair in group}
        if run.falls and len(told) < 2:
            continue
        if points and len(data) < MAX_ALLOCATIONS:
            pairs = [pair for group in points.values() for pair in group]
            rho = spearman([p[0] for p in pairs], [p[1] for p in pairs])
            data[label_of(run)] = {"points": points, "spearman": rho}
    if not data:
        return None
    used = [key for key in marks if any(key in entry["points"] for entry in data.values())]
    # Many targets share a score and a rank: types are set apart a little, in the legend's order.
    offsets = {key: 0.36 - 0.72 * (i + 0.5) / len(used) for i, key in enumerate(used)}
    across = min(2, len(data))
    down = -(-len(data) // across)
    width = 520.0 * across
    labels = [safe(key, 24) for key in used]
    shape = legend_shape(labels, width - 60, 12)
    head = 8 + 20 * shape[0]
    height = head + 300.0 * down
    drawn = canvas(width, height)
    for i, (label, entry) in enumerate(data.items()):
        row, column = divmod(i, across)
        bottom = height - head - 300 * row - 244
        box = (
            (520 * column + 60) / width,
            bottom / height,
            440 / width,
            214 / height,
        )
        ax = drawn.add_axes(box)
        for key, pairs in entry["points"].items():
            mark, x = marks[key], [score for score, _ in pairs]
            y = [rank + offsets[key] for _, rank in pairs]
            style = {"color": mark.color, "marker": mark.marker, "alpha": 0.8, "linewidths": 0}
            ax.scatter(x, y, s=26, **style)
        ax.set_title(label)
        ax.set_xlabel("score, in the method's unit")
        ax.set_ylabel("rank")
        ax.set_ylim(bottom=-0.5)
        ax.locator_params(axis="x", nbins=6)
        ax.ticklabel_format(axis="x", style="plain", useOffset=False)
        whole_ticks(ax, "y", 6)
    handles = [
        Line2D([], [], color=marks[k].color, marker=marks[k].marker, linestyle="") for k in used
    ]
    add_legend(drawn, handles, labels, shape, left=52)
    title = f"Score against {'final ' if final(runs) else ''}rank"
    return finish(drawn, "score-rank", title, _correlations(data), data)


def _correlations(data: dict) -> str:
    known = [
        f"{entry['spearman']:.2f} for {label}".replace("-", "−")
        for label, entry in data.items()
        if entry["spearman"] is not None
    ]
    text = (
        "How a score became a rank: one mark per target; marks of one rank are set apart by type "
        "so that none hides another."
    )
    if known:
        text += f" Spearman's rank correlation: {listed(known)}."
    return text + " The budget, the costs of the shapes and the rank bounds bend the relation."


@look()
def reliability_gauge(runs: Sequence[Run]) -> Figure | None:
    """Draw split-half agreement against its threshold, one line per measured run.

    Args:
        runs: The runs.

    Returns:
        The figure, or None if no agreement is known. ``data``: per run ``split_half``,
        ``within_shape`` and ``threshold`` (None if unknown).
    """
    marks = run_marks(runs)
    data, style = {}, {}
    for run in runs:
        told = run.reliability or {}
        values = {k: as_float(told.get(k)) for k in ("split_half", "within_shape", "threshold")}
        if values["split_half"] is not None or values["within_shape"] is not None:
            data[label_of(run)] = values
            style[label_of(run)] = marks[run.label]
    if not data:
        return None
    left = 26 + 7.6 * max(len(label) for label in data)
    width, height = 500.0, 92.0 + 46 * len(data)
    drawn = canvas(width, height)
    tall = 46 * len(data)
    ax = drawn.add_axes((left / width, 46 / height, (width - left - 20) / width, tall / height))
    lowest = min(v for values in data.values() for v in values.values() if v is not None)
    ax.set_xlim(min(0.0, np.floor(lowest * 2) / 2), 1.0)
    for row, (label, values) in enumerate(data.items()):
        _agreement(ax, row, values, style[label].color)
    ax.set_yticks(range(len(data)), list(data))
    ax.set_ylim(len(data) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(length=0)
    ax.set_xlabel("rank correlation of two halves' scores")
    handles = [
        Line2D([], [], color="#444444", marker="o", linestyle="", markersize=9),
        Line2D([], [], color="#444444", marker="D", linestyle="", markersize=8, mfc="white"),
        Line2D([], [], color="#333333", linestyle=(0, (5, 3))),
    ]
    labels = ["all targets", "within equal shapes", "threshold"]
    add_legend(drawn, handles, labels, (1, 3), left=12)
    caption = (
        "1 means that both halves rank the targets alike, 0 that they have nothing in common. "
        "Below the threshold (shaded) the scores are mostly noise and uniform ranks are the "
        "safer choice. Within equal shapes, agreement cannot come from the shapes alone."
    )
    return finish(drawn, "reliability", "Agreement of two halves", caption, data)


def _agreement(ax, row: int, values: dict[str, float | None], color: str) -> None:
    threshold, low = values["threshold"], ax.get_xlim()[0]
    if threshold is not None:
        ax.fill_between([low, threshold], row - 0.5, row + 0.5, color="#eeeeee", linewidth=0)
        ax.vlines(threshold, row - 0.5, row + 0.5, color="#333333", linestyle=(0, (5, 3)))
    if values["within_shape"] is not None:
        ax.plot(
            values["within_shape"], row, "D", ms=9, mfc="white", mec=color, mew=2, clip_on=False
        )
    if values["split_half"] is not None:
        ax.plot(values["split_half"], row, "o", ms=11, color=color, clip_on=False)
