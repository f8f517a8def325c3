"""Rank profiles side by side: mean rank over seeds by depth and module type, per method."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from gradrank.methods.registry import METHODS
from gradrank.report.comparison.strips import WIDTH, method_text
from gradrank.report.comparison.view import Row, View, label, mean, slug
from gradrank.report.layout import Layout, arrange
from gradrank.report.style import safe
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import listed, number

MAX_METHODS = 12
MAX_TYPES = 14
# Half octaves on either side of the middle; ranks beyond share the last.
_LEVELS = 5
_UNIFORM = "uniform"
_ACROSS = 2
_TALL, _TITLE, _GAP, _HEAD, _FOOT = 13, 24, 14, 52, 34
_SMALL: dict[str, Any] = {"va": "center_baseline", "fontsize": 10, "color": "#444444"}
_BOX = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]


def mean_ranks(row: Row) -> dict[str, float]:
    """Return the mean final rank of every target over seeds.

    Args:
        row: A row of the table.

    Returns:
        Mean rank by target; empty where no run has ranks.
    """
    known = [each.ranks for each in row.outcomes if each.ranks]
    names = dict.fromkeys(name for ranks in known for name in ranks)
    return {name: mean(float(ranks.get(name, 0)) for ranks in known) or 0.0 for name in names}


def level(rank: float, middle: float) -> int | None:
    """Return the colour of a rank: how many half octaves it is above or below the middle.

    Ranks of one table span two orders of magnitude, and on a linear scale one large rank would give
    all others the same colour.

    Args:
        rank: Mean rank, 0 or more.
        middle: The rank that has no colour, above 0.

    Returns:
        A whole number from -5 to 5; None for rank 0, which is no low rank but no adapter.

    Examples:
        >>> [level(rank, 8.0) for rank in (0, 4, 8, 12, 110)]
        [None, -2, 0, 1, 5]
    """
    if rank <= 0:
        return None
    return max(-_LEVELS, min(_LEVELS, round(2 * math.log2(rank / middle))))


@look()
def ranks_figures(view: View, task: str, budget: str, position: int) -> list[Figure]:
    """Draw the rank profiles of one task and budget.

    Labels that begin with the name of a method or control of ours come first, in the order of the
    registry; others (baselines among them) follow as the table has them.

    Args:
        view: The comparison.
        task: The task.
        budget: The budget.
        position: Number that makes the names distinct.

    Returns:
        One figure for each dozen of methods; none where ranks do not differ in any method. All
        share one scale. ``data``: ``rows``, ``columns``, ``middle``, and per method the mean ranks
        (``panels``; None where there is no target) and their colours (``levels``).
    """
    found = {row.method: mean_ranks(row) for row in view.of(task, budget)}
    varied = {m: ranks for m, ranks in found.items() if len(set(ranks.values())) > 1}
    order = sorted(varied, key=_place)
    if not order:
        return []
    layout = arrange(name for ranks in varied.values() for name in ranks)
    middle, whose = _middle(found, varied)
    parts = [order[i : i + MAX_METHODS] for i in range(0, len(order), MAX_METHODS)]
    title = f"Ranks by depth: {label(task)}, budget {label(budget, 40)}"
    said = (
        "Mean final rank over seeds; layers from left to right. Each colour is a factor of 1.41, "
        f"from the {whose} rank of {number(middle, 2)}, which is grey; the outermost hold all "
        f"beyond. Hatched: no adapter.{_dropped(layout)}"
    )
    figures = []
    for i, names in enumerate(parts, start=1):
        grids = {m: layout.grid(dict(varied[m]))[:MAX_TYPES] for m in names}
        drawn = _draw(view, grids, layout, middle, whose)
        data = {
            "rows": list(layout.rows[:MAX_TYPES]),
            "columns": layout.column_labels,
            "middle": middle,
            "panels": grids,
            "levels": {
                m: [[_level(v, middle) for v in row] for row in g] for m, g in grids.items()
            },
        }
        several = len(parts) > 1
        name = f"ranks-{slug(position, task, budget)}" + (f"-{i}" if i > 1 else "")
        full = f"{title} ({i} of {len(parts)})" if several else title
        caption = said + (_left_out(found) if i == 1 else "")
        figures.append(finish(drawn, name, full, caption, data, tall=True))
    return figures


def _level(rank: float | None, middle: float) -> int | None:
    return None if rank is None else level(rank, middle)


def _place(method: str) -> int:
    """Return the place of the method whose name a label begins with; others are the last."""
    fits = [(len(name), i) for i, name in enumerate(METHODS) if method.startswith(name)]
    return max(fits)[1] if fits else len(METHODS)


def _middle(
    found: Mapping[str, Mapping[str, float]], varied: Mapping[str, Mapping[str, float]]
) -> tuple[float, str]:
    """Return uniform LoRA's rank, or where that did not run the median of what is drawn."""
    same = set(found.get(_UNIFORM, {}).values())
    if len(same) == 1 and max(same) > 0:
        return same.pop(), _UNIFORM
    ranks = [rank for each in varied.values() for rank in each.values() if rank > 0]
    return median(ranks), "median"


def _draw(
    view: View,
    grids: Mapping[str, Sequence[Sequence[float | None]]],
    layout: Layout,
    middle: float,
    whose: str,
) -> Canvas:
    """Draw all panels in one pair of axes whose unit is a pixel: axes are slow to make."""
    types = layout.rows[:MAX_TYPES]
    left = 20 + round(6.2 * max(len(safe(each, 16)) for each in types))
    room = (WIDTH - left - 14 - _GAP * (_ACROSS - 1)) / _ACROSS
    inner = _TALL * len(types)
    down = -(-len(grids) // _ACROSS)
    height = _HEAD + down * (_TITLE + inner + _GAP) + _FOOT
    drawn = canvas(WIDTH, height)
    ax = drawn.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.axis("off")
    cell = room / len(layout.columns)
    boxes: dict[int | None, list[Any]] = {}
    for i, (method, grid) in enumerate(grids.items()):
        line, column = divmod(i, _ACROSS)
        x = left + column * (room + _GAP)
        y = _HEAD + line * (_TITLE + inner + _GAP) + _TITLE
        _cells(boxes, grid, middle, (x, y, cell))
        ax.text(x, y - 6, method_text(view, method), fontsize=11, fontweight="bold")
        for j, each in enumerate(types if not column else ()):
            ax.text(x - 5, y + (j + 0.5) * _TALL, safe(each, 16), ha="right", **_SMALL)
        if i + _ACROSS >= len(grids):
            _columns(ax, layout, (x, y + inner, cell), room)
    _paint(ax, boxes)
    _legend(ax, middle, whose)
    return drawn


def _cells(
    boxes: dict[int | None, list[Any]],
    grid: Sequence[Sequence[float | None]],
    middle: float,
    at: tuple[float, float, float],
) -> None:
    left, upper, cell = at
    for j, row in enumerate(grid):
        for i, value in enumerate(row):
            if value is not None:
                x, y = left + i * cell, upper + j * _TALL
                right, low = x + cell, y + _TALL
                corners = [(x, y), (right, y), (right, low), (x, low), (x, y)]
                boxes.setdefault(level(value, middle), []).append(corners)


def _paint(ax: Axes, boxes: Mapping[int | None, Sequence[Any]]) -> None:
    """Draw all cells of one colour as one path."""
    for place in sorted(boxes, key=lambda key: -math.inf if key is None else key):
        found = boxes[place]
        path = Path(np.array(found).reshape(-1, 2), np.tile(_BOX, len(found)))
        ax.add_artist(PathPatch(path, **_fill(place)))


def _fill(place: int | None) -> dict[str, Any]:
    if place is None:
        return {"facecolor": "#ffffff", "edgecolor": "#c0c4cc", "hatch": "///", "linewidth": 0.3}
    # Orange below and purple above, which all kinds of sight tell apart; the scheme's own middle is
    # white, the colour of the page.
    strength = math.copysign(0.08 + 0.42 * abs(place) / _LEVELS, place)
    colour = mpl.colormaps["PuOr"](0.5 + strength) if place else "#e9e9e9"
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}


def _columns(ax: Axes, layout: Layout, at: tuple[float, float, float], room: float) -> None:
    x, y, cell = at
    labels = layout.column_labels
    fits = 9 * max(len(text) for text in labels) * len(labels) / room
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n >= fits), 200)
    for i in range(0, len(labels), every):
        ax.text(x + (i + 0.5) * cell, y + 10, labels[i], ha="center", **_SMALL)
    ax.text(x + room / 2, y + 25, "layer", ha="center", **_SMALL)


def _legend(ax: Axes, middle: float, whose: str) -> None:
    ax.text(16, 17, "mean rank", va="center_baseline", fontsize=11)
    left, step = 88, 24
    places = [None, *range(-_LEVELS, _LEVELS + 1)]
    for i, place in enumerate(places):
        # The strip of rank 0 stands apart: it is no low rank but no adapter.
        x = left + i * step + (8 if i else 0)
        ax.add_artist(Rectangle((x, 9), step, 13, **_fill(place)))
        if place is None or place % 2 == 0:
            text = "0" if place is None else number(middle * 2 ** (place / 2), 2)
            ax.text(x + step / 2, 35, text, ha="center", **_SMALL)
    end = left + len(places) * step + 16
    ax.text(end, 17, f"{whose}: {number(middle, 2)}", **_SMALL)


def _left_out(found: Mapping[str, Mapping[str, float]]) -> str:
    text = ""
    same = [label(m, 30) for m, ranks in found.items() if len(set(ranks.values())) == 1]
    if same:
        text += f" Not drawn, one rank everywhere: {listed(same)}."
    none = [label(m, 30) for m, ranks in found.items() if not ranks]
    if none:
        text += f" Without ranks: {listed(none)}."
    return text


def _dropped(layout: Layout) -> str:
    dropped = len(layout.rows) - MAX_TYPES
    return f" The first {MAX_TYPES} module types are drawn." if dropped > 0 else ""
