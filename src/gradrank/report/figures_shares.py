"""How many neurons are dominant: the share per layer and module type."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradrank.report.layout import Layout
from gradrank.report.style import Mark, add_legend, legend_shape, percent_ticks, run_marks, safe
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, percent
from gradrank.report.timemap import evenly
from gradrank.report.view import Run

MAX_TYPES = 24
MAX_RUNS = 6
MAX_DOTS = 60
_WIDTH, _LINE, _FOOT, _NOTE = 500, 15, 44, 16
_PAPER = "pilora"
_REFERENCE = "half (paper: just below)"


@look()
def dominant_shares(runs: Mapping[str, Run], layout: Layout) -> Figure | None:
    """Draw the share of dominant neurons of each target, by module type, and its mean.

    Args:
        runs: The runs with partitions, by label.
        layout: Gives the module types.

    Returns:
        The figure, or None without partitions. ``data``: per run and module type ``shares`` (by
        layer) and ``mean`` (dominant neurons over all neurons of the type).

    Source:
        PiLoRA, section 4.4: most tasks make slightly less than half of the parameters dominant.
    """
    shown_runs = dict(list(runs.items())[:MAX_RUNS])
    data = {label: _shares(run, layout) for label, run in shown_runs.items()}
    rows = [row for row in layout.rows if any(row in by for by in data.values())]
    if not rows:
        return None
    shown = rows[:MAX_TYPES]
    by_run = run_marks(list(shown_runs.values()))
    marks = [_own(by_run[run.label], i) for i, run in enumerate(shown_runs.values())]
    reference = any(run.method == _PAPER for run in shown_runs.values())
    handles, texts = _legend(marks, list(shown_runs), reference)
    shape = legend_shape(texts, _WIDTH - 20, 2)
    band = _LINE * len(shown_runs) + 11
    head, tall = 12 + 20 * shape[0], band * len(shown)
    height = head + tall + _FOOT
    drawn = canvas(_WIDTH, height)
    left = 22 + 7.4 * max(len(safe(row, 22)) for row in shown)
    wide = _WIDTH - left - _NOTE
    ax = drawn.add_axes((left / _WIDTH, _FOOT / height, wide / _WIDTH, tall / height))
    for position, row in enumerate(shown):
        if position % 2:
            ax.axhspan(position * band, (position + 1) * band, color="#f4f5f7", linewidth=0)
        for line, (label, mark) in enumerate(zip(shown_runs, marks, strict=True)):
            if row in data[label]:
                _dots(ax, data[label][row], mark, position * band + 5.5 + _LINE * (line + 0.5))
    if reference:
        ax.axvline(0.5, color="#333333", linestyle=(0, (4, 2)), linewidth=1.2)
    ax.set_xlim(0, 1)
    ax.set_ylim(tall, 0)
    ax.set_yticks([band * (i + 0.5) for i in range(len(shown))], [safe(r, 22) for r in shown])
    ax.grid(axis="y", visible=False)
    ax.tick_params(length=0)
    percent_ticks(ax.xaxis)
    ax.set_xlabel("share of dominant neurons")
    add_legend(drawn, handles, texts, shape, left=6)
    caption = _caption(len(rows) - len(shown), len(runs) - len(shown_runs), data)
    title = "Share of dominant neurons by module type"
    return finish(drawn, "dominant-shares", title, caption, data, _headline(data))


def _shares(run: Run, layout: Layout) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[tuple[int, int, int]]] = {}
    for name, split in run.splits.items():
        told = (layout.places[name][0], split.dominant_rows, split.d_out)
        groups.setdefault(layout.row_of(name), []).append(told)
    return {
        row: {
            "shares": [dominant / rows for _, dominant, rows in sorted(found)],
            "mean": sum(d for _, d, _ in found) / sum(m for _, _, m in found),
        }
        for row, found in groups.items()
    }


def _own(mark: Mark, i: int) -> Mark:
    """Give each run a colour of its own: runs of one method are what is compared here."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#444444")
    return Mark(colours[i % len(colours)], mark.marker, mark.line, mark.hatch)


def _dots(ax: Axes, entry: Mapping[str, Any], mark: Mark, y: float) -> None:
    kept = [entry["shares"][i] for i in evenly(len(entry["shares"]), MAX_DOTS)]
    small = {"markersize": 4, "markerfacecolor": "white", "markeredgecolor": mark.color}
    ax.plot(kept, [y] * len(kept), marker="o", linewidth=0, clip_on=False, **small)
    whole = {"markersize": 9, "color": mark.color, "markeredgecolor": "white"}
    ax.plot([entry["mean"]], [y], marker=mark.marker, clip_on=False, **whole)


def _legend(
    marks: Sequence[Mark], labels: Sequence[str], reference: bool
) -> tuple[list[Any], list[str]]:
    handles = [
        Line2D([], [], color=m.color, marker=m.marker, markersize=8, linewidth=0) for m in marks
    ]
    texts = [safe(label, 26) for label in labels]
    if reference:
        handles.append(Line2D([], [], color="#333333", linestyle=(0, (4, 2)), linewidth=1.2))
        texts.append(_REFERENCE)
    return handles, texts


def _caption(types: int, runs: int, data: Mapping[str, Mapping[str, Any]]) -> str:
    caption = "Hollow dots: one per layer. Filled: dominant neurons over all neurons of the type."
    longest = max(len(entry["shares"]) for by in data.values() for entry in by.values())
    if longest > MAX_DOTS:
        caption += f" Of more than {count(MAX_DOTS)} layers, {count(MAX_DOTS)} dots are drawn."
    if types > 0:
        caption += f" The first {count(MAX_TYPES)} module types are drawn."
    if runs > 0:
        caption += f" The first {count(MAX_RUNS)} runs are drawn."
    return caption


def _headline(data: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for label, by in list(data.items())[:3]:
        means = {row: entry["mean"] for row, entry in by.items()}
        top, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        if top == low:
            parts.append(f"{label}: {percent(means[top])} of the neurons of {top}")
        else:
            parts.append(
                f"{label}: most in {top} ({percent(means[top])}), least in {low} "
                f"({percent(means[low])})"
            )
    return f"{'; '.join(parts)}."
