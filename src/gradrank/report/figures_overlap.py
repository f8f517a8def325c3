"""Overlap of partitions between runs: a matrix beside its chance level, and by module type."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradrank.report.pairs import Pair
from gradrank.report.style import add_legend, colour_map, ink_on, legend_shape, percent_ticks, safe
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, percent

MAX_TYPES = 24
_WIDTH = 500
_ALL = "all types"


@look()
def overlap_matrix(labels: Sequence[str], pairs: Sequence[Pair]) -> Figure | None:
    """Draw the Jaccard index of every pair of runs, and below it what chance gives.

    Args:
        labels: Labels of the runs that are compared.
        pairs: Their overlaps.

    Returns:
        The figure, or None with fewer than three runs. ``data``: ``runs``, and as square tables
        ``jaccard`` and ``chance``, with None where nothing can be compared.
    """
    if len(labels) < 3 or not any(pair.whole.jaccard is not None for pair in pairs):
        return None
    tables = {key: _square(labels, pairs, key) for key in ("jaccard", "chance")}
    n = len(labels)
    left = 44 + round(7.2 * max(len(safe(label, 28)) for label in labels))
    cell = min(44, (_WIDTH - left - 14) // n)
    block = 30 + cell * n + 26
    height = 2 * block
    drawn = canvas(_WIDTH, height)
    titles = {"jaccard": "measured", "chance": "by chance, for sets of the same sizes"}
    for i, (key, table) in enumerate(tables.items()):
        bottom = 1 - (i * block + 30 + cell * n) / height
        box = (left / _WIDTH, bottom, cell * n / _WIDTH, cell * n / height)
        ax = drawn.add_axes(box)
        ax.text(-left + 8, -11, titles[key], fontweight="bold", va="baseline")
        _matrix(ax, table, labels, cell)
    caption = (
        "Shared dominant neurons over the neurons that are dominant in either run (Jaccard index, "
        "in per cent), over all targets that both runs split. The lower table has the same colours "
        "and shows what random sets of the same sizes would share: only what goes beyond it says "
        "that two runs agree."
    )
    title = "Overlap of dominant neurons between runs"
    headline = _extremes(pairs)
    return finish(
        drawn, "partition-overlap", title, caption, {"runs": list(labels), **tables}, headline
    )


@look()
def overlap_by_type(pairs: Sequence[Pair]) -> Figure | None:
    """Draw the Jaccard index of every pair by module type, beside its chance level.

    Args:
        pairs: The overlaps.

    Returns:
        The figure, or None if nothing can be compared. ``data``: per module type ``jaccard`` and
        ``chance``, one value per pair.
    """
    data = _by_type(pairs)
    if not data:
        return None
    shown = list(data)[:MAX_TYPES]
    band, foot = 26, 44
    texts = (
        ["measured, one dot per pair of runs", "by chance"]
        if len(pairs) > 1
        else [
            "measured",
            "by chance",
        ]
    )
    handles = [
        Line2D([], [], color="#0072B2", marker="o", markersize=7, linewidth=0),
        Line2D([], [], color="#D55E00", marker="|", markersize=13, markeredgewidth=2, linewidth=0),
    ]
    shape = legend_shape(texts, _WIDTH - 20, 2)
    tall = band * len(shown)
    height = 14 + 20 * shape[0] + tall + foot
    drawn = canvas(_WIDTH, height)
    left = 22 + 7.4 * max(len(safe(row, 22)) for row in shown)
    box = (left / _WIDTH, foot / height, (_WIDTH - left - 24) / _WIDTH, tall / height)
    ax = drawn.add_axes(box)
    for i, row in enumerate(shown):
        if i % 2:
            ax.axhspan(i * band, (i + 1) * band, color="#f4f5f7", linewidth=0)
        _row(ax, data[row], (i + 0.5) * band)
    ax.set_xlim(0, 1)
    ax.set_ylim(tall, 0)
    ax.set_yticks([band * (i + 0.5) for i in range(len(shown))], [safe(r, 22) for r in shown])
    ax.grid(axis="y", visible=False)
    ax.tick_params(length=0)
    percent_ticks(ax.xaxis)
    ax.set_xlabel("Jaccard index of dominant neurons")
    add_legend(drawn, handles, texts, shape, left=6)
    caption = _by_type_caption(len(pairs), len(data) - len(shown))
    title = "Overlap by module type"
    return finish(drawn, "partition-overlap-by-type", title, caption, data, _by_type_words(data))


def _row(ax: Axes, entry: Mapping[str, Sequence[float]], y: float) -> None:
    dots = {"markerfacecolor": "#0072B2", "markeredgecolor": "white", "markeredgewidth": 0.7}
    ys = [y] * len(entry["jaccard"])
    ax.plot(entry["jaccard"], ys, marker="o", markersize=7, linewidth=0, clip_on=False, **dots)
    chance = sum(entry["chance"]) / len(entry["chance"])
    bar = {"color": "#D55E00", "markersize": 15, "markeredgewidth": 2, "linewidth": 0}
    ax.plot([chance], [y], marker="|", clip_on=False, **bar)


def _square(labels: Sequence[str], pairs: Sequence[Pair], key: str) -> list[list[float | None]]:
    at = {label: i for i, label in enumerate(labels)}
    table: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    for pair in pairs:
        a, b = at[pair.first], at[pair.second]
        table[a][b] = table[b][a] = getattr(pair.whole, key)
    return table


def _matrix(
    ax: Axes, table: Sequence[Sequence[float | None]], labels: Sequence[str], cell: int
) -> None:
    n = len(labels)
    colours = colour_map("cividis")
    ax.set_xlim(0, n * cell)
    ax.set_ylim(n * cell, 0)
    ax.axis("off")
    for i, row in enumerate(table):
        place = {"ha": "right", "va": "center_baseline", "fontsize": 11}
        ax.text(-8, (i + 0.5) * cell, f"{i + 1}. {safe(labels[i], 28)}", **place)
        ax.text((i + 0.5) * cell, n * cell + 14, f"{i + 1}", ha="center", va="center_baseline")
        for j, value in enumerate(row):
            x, y = j * cell, i * cell
            colour = "#f1f1f1" if value is None else colours(value)
            ax.fill(
                [x, x + cell, x + cell, x],
                [y, y, y + cell, y + cell],
                color=colour,
                edgecolor="white",
                linewidth=1,
            )
            text = "" if value is None else f"{100 * value:.0f}"
            if i == j:
                text = "–"
            if cell >= 16 and text:
                ink = "#777777" if value is None else ink_on(colours(value))
                size = 11 if cell >= 24 else 9
                style = {"ha": "center", "va": "center_baseline", "fontsize": size, "color": ink}
                ax.text(x + cell / 2, y + cell / 2, text, **style)


def _by_type(pairs: Sequence[Pair]) -> dict[str, dict[str, list[float]]]:
    data: dict[str, dict[str, list[float]]] = {}
    for pair in pairs:
        for row, found in ((_ALL, pair.whole), *pair.types.items()):
            if found.jaccard is not None and found.chance is not None:
                entry = data.setdefault(row, {"jaccard": [], "chance": []})
                entry["jaccard"].append(found.jaccard)
                entry["chance"].append(found.chance)
    return data if len(data) > 2 else {row: data[row] for row in data if row == _ALL}


def _extremes(pairs: Sequence[Pair]) -> str:
    known = [pair for pair in pairs if pair.whole.jaccard is not None]
    top = max(known, key=lambda pair: pair.whole.jaccard or 0)
    low = min(known, key=lambda pair: pair.whole.jaccard or 0)
    said = f"{top.first} and {top.second} share most ({percent(top.whole.jaccard)}, "
    said += f"{percent(top.whole.chance)} by chance)"
    if top is low:
        return f"{said}."
    return (
        f"{said}; {low.first} and {low.second} least ({percent(low.whole.jaccard)}, "
        f"{percent(low.whole.chance)} by chance)."
    )


def _by_type_caption(pairs: int, hidden: int) -> str:
    caption = (
        "Where dots stand right of the bar, runs choose the same neurons more often than random "
        "sets of the same sizes would."
    )
    if pairs > 1:
        caption += " The bar is the mean chance level over the pairs."
    if hidden > 0:
        caption += f" The first {count(MAX_TYPES)} rows are drawn."
    return caption


def _by_type_words(data: Mapping[str, Any]) -> str:
    types = [row for row in data if row != _ALL] or list(data)
    above = {
        row: (sum(data[row]["jaccard"]) - sum(data[row]["chance"])) / len(data[row]["jaccard"])
        for row in types
    }
    top = max(above, key=above.__getitem__)
    entry = data[top]
    means = [sum(entry[key]) / len(entry[key]) for key in ("jaccard", "chance")]
    if len(types) == 1:
        return f"Mean Jaccard index {percent(means[0])}, by chance {percent(means[1])}."
    return (
        f"Furthest above chance: {top}, with a mean Jaccard index of {percent(means[0])} where "
        f"chance gives {percent(means[1])}."
    )
