"""Which module types got the ranks: means per type, from the start of a run to its end."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradrank.report.figures_ranks import Allocation, allocations
from gradrank.report.layout import Layout
from gradrank.report.style import add_legend, legend_shape, safe
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, number
from gradrank.report.view import Run, final

MAX_TYPES = 24
_WIDTH, _NOTE, _FOOT = 500, 108, 44
_LINE = 15
# From this height on there is room for two other figures beside it.
_TALL = 150


@look()
def type_means(runs: Sequence[Run], layout: Layout) -> Figure | None:
    """Draw the mean rank of each module type: at the start where it is known, and at the end.

    Args:
        runs: The runs.
        layout: Gives the module types.

    Returns:
        The figure, or None if no allocation differs between targets and none changed. ``data``:
        per allocation and module type ``end`` (mean rank, zeros included), ``zeros`` (targets of
        rank 0), ``targets``, and ``start`` where it is known.

    Source:
        IGU-LoRA, Figure 5: ranks by layer and module type.
    """
    every = allocations(runs)
    if all(a.constant is not None and a.start in (None, a.ranks) for a in every):
        return None
    data = {a.label: _means(a, layout) for a in every}
    rows = [row for row in layout.rows if any(row in means for means in data.values())]
    shown = rows[:MAX_TYPES]
    moved = any("start" in entry for means in data.values() for entry in means.values())
    legend = _legend(every, moved)
    shape = legend_shape(legend[1], _WIDTH - 20, 3)
    band = _LINE * len(every) + 11
    head, tall = 12 + 20 * shape[0], band * len(shown)
    height = head + tall + _FOOT
    drawn = canvas(_WIDTH, height)
    left = 22 + 7.4 * max(len(safe(row, 22)) for row in shown)
    note = _NOTE if len(every) == 1 else 16
    ax = drawn.add_axes(
        (left / _WIDTH, _FOOT / height, (_WIDTH - left - note) / _WIDTH, tall / height)
    )
    for position, row in enumerate(shown):
        if position % 2:
            ax.axhspan(position * band, (position + 1) * band, color="#f4f5f7", linewidth=0)
        for line, allocation in enumerate(every):
            entry = data[allocation.label].get(row)
            if entry is not None:
                y = position * band + 5.5 + _LINE * (line + 0.5)
                _course(ax, entry, allocation, y, len(every) == 1)
    values = [v for m in data.values() for e in m.values() for v in (e["end"], e.get("start", 0))]
    ax.set_xlim(0, 1.04 * max([1.0, *values]))
    ax.set_ylim(tall, 0)
    ax.set_yticks([band * (i + 0.5) for i in range(len(shown))], [safe(r, 22) for r in shown])
    ax.grid(axis="y", visible=False)
    ax.tick_params(length=0)
    ax.set_xlabel("mean rank, rank 0 included")
    add_legend(drawn, *legend, shape, left=6, handlelength=2.2)
    caption = "Filled: the mean over all layers of a type" + (", in the end." if moved else ".")
    caption += " Hollow: at the start of training." if moved else ""
    if any(a.split for a in every):
        caption += " A neuron partition counts with r + r', the rank of its stock LoRA."
    if len(rows) > len(shown):
        caption += f" The first {count(MAX_TYPES)} module types are drawn."
    title = "Mean rank by module type" + (", start and end" if final(runs) else "")
    return finish(drawn, "rank-by-type", title, caption, data, _headline(every, data), tall > _TALL)


def _means(allocation: Allocation, layout: Layout) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[str]] = {}
    for name in allocation.ranks:
        groups.setdefault(layout.row_of(name), []).append(name)
    result: dict[str, dict[str, Any]] = {}
    for row, names in groups.items():
        ranks = [allocation.ranks[name] for name in names]
        entry: dict[str, Any] = {"end": sum(ranks) / len(ranks), "targets": len(ranks)}
        entry["zeros"] = sum(1 for rank in ranks if not rank)
        if allocation.start is not None:
            entry["start"] = sum(allocation.start.get(name, 0) for name in names) / len(names)
        result[row] = entry
    return result


def _course(
    ax: Axes, entry: Mapping[str, Any], allocation: Allocation, y: float, alone: bool
) -> None:
    """Draw one type of one run: a line from its start to its end, and what it ended with."""
    mark, end = allocation.mark, entry["end"]
    if "start" in entry:
        start = entry["start"]
        ax.plot([start, end], [y, y], color=mark.color, linewidth=2.4, solid_capstyle="butt")
        style = {"markerfacecolor": "white", "markeredgecolor": mark.color, "markeredgewidth": 1.6}
        ax.plot(start, y, marker="o", markersize=7, clip_on=False, **style)
    ax.plot(end, y, marker=mark.marker, markersize=8, color=mark.color, clip_on=False)
    if alone:
        text = number(end, 3)
        if entry["zeros"]:
            text += f", {count(entry['zeros'])} of {count(entry['targets'])} at 0"
        place = {"transform": ax.get_yaxis_transform(), "va": "center_baseline", "fontsize": 11}
        ax.text(1.03, y, text, **place)


def _legend(every: Sequence[Allocation], moved: bool) -> tuple[list[Any], list[str]]:
    handles = [
        Line2D(
            [],
            [],
            color=a.mark.color,
            marker=a.mark.marker,
            markersize=8,
            linewidth=2.4 if a.start is not None else 0,
        )
        for a in every
    ]
    labels = [safe(a.label, 26) for a in every]
    if moved:
        style = {"color": "#555555", "markerfacecolor": "white", "markeredgewidth": 1.6}
        handles.append(Line2D([], [], marker="o", markersize=7, linestyle="", **style))
        labels.append("at the start")
    return handles, labels


def _headline(every: Sequence[Allocation], data: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for allocation in every:
        ends = {row: entry["end"] for row, entry in data[allocation.label].items()}
        top, low = max(ends, key=ends.__getitem__), min(ends, key=ends.__getitem__)
        if ends[top] == ends[low]:
            continue
        parts.append(
            f"{allocation.label}: most in {top} (mean rank {number(ends[top], 3)}), least in {low} "
            f"({number(ends[low], 3)})"
        )
    return f"{'; '.join(parts[:3])}." if parts else "All module types have the same mean rank."
