"""Rank profiles side by side: mean rank over seeds by depth and module type, per method."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from gradrank.report.comparison.strips import WIDTH, method_text
from gradrank.report.comparison.view import Row, View, label, mean, slug
from gradrank.report.layout import Layout, arrange
from gradrank.report.style import safe
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import listed, number, plural

MAX_METHODS = 12
MAX_TYPES = 14
_LEVELS = 8
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


@look()
def ranks_figure(view: View, task: str, budget: str, position: int) -> Figure | None:
    """Draw the rank profiles of one task and budget.

    Args:
        view: The comparison.
        task: The task.
        budget: The budget.
        position: Number that makes the name distinct.

    Returns:
        The figure, or None where ranks do not differ in any method. ``data``: ``rows``,
        ``columns`` and per method the mean ranks (None where there is no target).
    """
    found = {row.method: mean_ranks(row) for row in view.of(task, budget)}
    varied = {m: ranks for m, ranks in found.items() if len(set(ranks.values())) > 1}
    if not varied:
        return None
    shown = dict(list(varied.items())[:MAX_METHODS])
    layout = arrange(name for ranks in shown.values() for name in ranks)
    types = layout.rows[:MAX_TYPES]
    top = max(max(ranks.values()) for ranks in shown.values())
    grids = {m: layout.grid(dict(ranks))[: len(types)] for m, ranks in shown.items()}
    drawn = _draw(view, grids, layout, types, top)
    caption = "Mean final rank over seeds; layers from left to right. Hatched: no adapter."
    caption += _left_out(found, varied, shown) + _dropped(layout)
    data = {"rows": list(types), "columns": layout.column_labels, "panels": grids}
    title = f"Ranks by depth: {label(task)}, budget {label(budget, 40)}"
    name = f"ranks-{slug(position, task, budget)}"
    return finish(drawn, name, title, caption, data, tall=True)


def _draw(
    view: View,
    grids: Mapping[str, Sequence[Sequence[float | None]]],
    layout: Layout,
    types: Sequence[str],
    top: float,
) -> Canvas:
    """Draw all panels in one pair of axes whose unit is a pixel: axes are slow to make."""
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
    boxes: dict[int, list[Any]] = {}
    for i, (method, grid) in enumerate(grids.items()):
        line, column = divmod(i, _ACROSS)
        x = left + column * (room + _GAP)
        y = _HEAD + line * (_TITLE + inner + _GAP) + _TITLE
        _cells(boxes, grid, top, (x, y, cell))
        ax.text(x, y - 6, method_text(view, method), fontsize=11, fontweight="bold")
        for j, each in enumerate(types if not column else ()):
            ax.text(x - 5, y + (j + 0.5) * _TALL, safe(each, 16), ha="right", **_SMALL)
        if i + _ACROSS >= len(grids):
            _columns(ax, layout, (x, y + inner, cell), room)
    _paint(ax, boxes)
    _legend(ax, top)
    return drawn


def _cells(
    boxes: dict[int, list[Any]],
    grid: Sequence[Sequence[float | None]],
    top: float,
    at: tuple[float, float, float],
) -> None:
    left, upper, cell = at
    for j, row in enumerate(grid):
        for i, value in enumerate(row):
            if value is not None:
                level = 0 if value == 0 else max(1, round(_LEVELS * value / top))
                x, y = left + i * cell, upper + j * _TALL
                right, low = x + cell, y + _TALL
                corners = [(x, y), (right, y), (right, low), (x, low), (x, y)]
                boxes.setdefault(level, []).append(corners)


def _paint(ax: Axes, boxes: Mapping[int, Sequence[Any]]) -> None:
    """Draw all cells of one colour as one path."""
    for level, found in sorted(boxes.items()):
        path = Path(np.array(found).reshape(-1, 2), np.tile(_BOX, len(found)))
        ax.add_artist(PathPatch(path, **_fill(level)))


def _fill(level: int) -> dict[str, Any]:
    if not level:
        return {"facecolor": "#ffffff", "edgecolor": "#c0c4cc", "hatch": "///", "linewidth": 0.3}
    colour = mpl.colormaps["viridis_r"](0.04 + 0.94 * level / _LEVELS)
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}


def _columns(ax: Axes, layout: Layout, at: tuple[float, float, float], room: float) -> None:
    x, y, cell = at
    labels = layout.column_labels
    fits = 9 * max(len(text) for text in labels) * len(labels) / room
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n >= fits), 200)
    for i in range(0, len(labels), every):
        ax.text(x + (i + 0.5) * cell, y + 10, labels[i], ha="center", **_SMALL)
    ax.text(x + room / 2, y + 25, "layer", ha="center", **_SMALL)


def _legend(ax: Axes, top: float) -> None:
    ax.text(16, 17, "mean rank", va="center_baseline", fontsize=11)
    left, step = 92, 24
    for level in range(_LEVELS + 1):
        # The strip of rank 0 stands apart: it is no low rank but no adapter.
        x = left + level * step + (8 if level else 0)
        ax.add_artist(Rectangle((x, 9), step, 13, **_fill(level)))
    texts = [(left + step / 2, "0")]
    for level in (_LEVELS // 2, _LEVELS):
        texts += [(left + 8 + step * (0.5 + level), number(top * level / _LEVELS, 2))]
    for x, text in texts:
        ax.text(x, 35, text, ha="center", **_SMALL)


def _left_out(
    found: Mapping[str, Mapping[str, float]],
    varied: Mapping[str, Any],
    shown: Mapping[str, Any],
) -> str:
    text = ""
    same = [label(m, 30) for m, ranks in found.items() if len(set(ranks.values())) == 1]
    if same:
        text += f" Not drawn, one rank everywhere: {listed(same)}."
    none = [label(m, 30) for m, ranks in found.items() if not ranks]
    if none:
        text += f" Without ranks: {listed(none)}."
    if len(varied) > len(shown):
        text += f" {plural(len(varied) - len(shown), 'further method')} left out."
    return text


def _dropped(layout: Layout) -> str:
    dropped = len(layout.rows) - MAX_TYPES
    return f" The first {MAX_TYPES} module types are drawn." if dropped > 0 else ""
