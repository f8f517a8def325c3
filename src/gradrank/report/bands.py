"""Bands: one horizontal strip per target, its output neurons from left to right."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from gradrank.core.partition import NeuronPartition
from gradrank.report.neurons import shares
from gradrank.report.style import safe
from gradrank.report.svg import canvas
from gradrank.report.text import count

NARROW, WIDE = 500, 1040
MAX_CELLS = 256
_LEVELS = 8
_HEAD, _TITLE, _FOOT, _GAP, _RIGHT = 44, 24, 20, 18, 12
_RECTANGLE = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]


@dataclass(frozen=True)
class Panel:
    """Bands that stand under each other.

    Attributes:
        title: Heading.
        bands: Partition by row label; a label without one leaves its row empty.
    """

    title: str
    bands: Mapping[str, NeuronPartition]


def band_panels(
    panels: Sequence[Panel],
    labels: Sequence[str],
    axis: str,
    across: int,
    cells: int,
    tall: float,
) -> tuple[Canvas, dict[str, Any]]:
    """Draw panels of bands, some beside each other, with the same rows in each.

    Args:
        panels: The panels.
        labels: Row labels, from the top.
        axis: What the rows are, written above their labels; "" for nothing.
        across: Panels in a row; more than two make a wide figure.
        cells: Most cells in a band.
        tall: Height of a band with the gap below it, in pixels.

    Returns:
        The canvas, and what was drawn: per panel and row ``share`` (of dominant neurons in each
        cell, rounded to an eighth as the colours are) and ``neurons`` (number of rows).
    """
    longest = max(len(axis) - 1, *(len(safe(label, 30)) for label in labels))
    left = 22 + round(7.2 * longest)
    width = WIDE if across > 2 else NARROW
    room = (width - left - _RIGHT - _GAP * (across - 1)) // across
    down = -(-len(panels) // across)
    block = _TITLE + round(tall * len(labels)) + _FOOT
    height = _HEAD + block * down
    drawn = canvas(width, height)
    data: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        row, column = divmod(i, across)
        x, top = left + column * (room + _GAP), _HEAD + row * block + _TITLE
        inner = round(tall * len(labels))
        box = (x / width, 1 - (top + inner) / height, room / width, inner / height)
        ax = drawn.add_axes(box)
        ax.set_xlim(0, room)
        ax.set_ylim(inner, 0)
        ax.axis("off")
        data[panel.title] = _bands(ax, panel, labels, cells, room, tall)
        ax.text(0, -8, safe(panel.title, 24), fontweight="bold", va="baseline")
        ax.text(room, -8, _neurons(panel), ha="right", va="baseline", fontsize=10, color="#666666")
        if column == 0:
            _row_labels(ax, labels, axis, tall)
    _legend(drawn, width, height)
    return drawn, data


def _bands(
    ax: Axes, panel: Panel, labels: Sequence[str], cells: int, room: int, tall: float
) -> dict[str, Any]:
    thick = tall - 1 if tall >= 4 else tall
    boxes: dict[int, list[tuple[float, float, float]]] = {}
    data: dict[str, Any] = {}
    for i, label in enumerate(labels):
        split = panel.bands.get(label)
        if split is None:
            continue
        wide = _cell_width(split.d_out, cells, room)
        levels = np.rint(_LEVELS * shares(split, max(1, int(room / wide + 1e-6)))).astype(int)
        wide = room / len(levels)
        top = i * tall
        ax.add_artist(Rectangle((0, top), room, thick, color=band_colour(0), linewidth=0))
        for start, stop, level in stretches(levels.tolist()):
            if level:
                boxes.setdefault(level, []).append((start * wide, stop * wide, top))
        data[label] = {"share": (levels / _LEVELS).tolist(), "neurons": split.d_out}
    for level, found in sorted(boxes.items()):
        corners = [((a, y), (b, y), (b, y + thick), (a, y + thick), (a, y)) for a, b, y in found]
        path = Path(np.array(corners).reshape(-1, 2), np.tile(_RECTANGLE, len(corners)))
        ax.add_artist(PathPatch(path, facecolor=band_colour(level), linewidth=0))
    return data


def _cell_width(rows: int, cells: int, room: int) -> float:
    """Return the width of a cell: whole pixels where cells are many, which also saves digits."""
    most = min(rows, cells, MAX_CELLS, room)
    return room / rows if rows <= min(most, 64) else math.ceil(room / most)


def stretches(levels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Join equal neighbours.

    Args:
        levels: The levels of one band.

    Yields:
        Start, end (exclusive) and level of each stretch.

    Examples:
        >>> list(stretches([1, 1, 0]))
        [(0, 2, 1), (2, 3, 0)]
    """
    start = 0
    for i in range(1, len(levels) + 1):
        if i == len(levels) or levels[i] != levels[start]:
            yield start, i, levels[start]
            start = i


def band_colour(level: int) -> Any:
    """Return the colour of a share: pale is none, dark is all.

    Args:
        level: The share, in eighths.

    Returns:
        The colour.
    """
    return mpl.colormaps["Blues"](0.06 + 0.94 * level / _LEVELS)


def _neurons(panel: Panel) -> str:
    sizes = sorted({split.d_out for split in panel.bands.values()})
    if not sizes:
        return ""
    span = count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])}–{count(sizes[-1])}"
    return f"{span} neuron" + ("" if sizes == [1] else "s")


def _row_labels(ax: Axes, labels: Sequence[str], axis: str, tall: float) -> None:
    every = max(1, math.ceil(12 / tall))
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n >= every), every)
    for i, label in enumerate(labels):
        if i % every == 0:
            place = {"ha": "right", "va": "center_baseline", "fontsize": 10.5, "color": "#444444"}
            ax.text(-7, (i + 0.5) * tall, safe(label, 30), **place)
    if axis:
        ax.text(-7, -8, axis, ha="right", va="baseline", fontsize=10.5, color="#444444")


def _legend(drawn: Canvas, width: float, height: float) -> None:
    """Draw the colours above the panels, with the share that each end stands for."""
    step = 20
    ax = drawn.add_axes((0, 1 - 40 / height, 1, 36 / height))
    ax.set_xlim(0, width)
    ax.set_ylim(36, 0)
    ax.axis("off")
    ax.text(6, 14, "share of dominant neurons", va="center_baseline", fontsize=11)
    left = 186
    for level in range(_LEVELS + 1):
        box = Rectangle(
            (left + level * step, 6), step, 13, facecolor=band_colour(level), linewidth=0
        )
        ax.add_artist(box)
    ends = ((0.5, "none"), (_LEVELS / 2 + 0.5, "half"), (_LEVELS + 0.5, "all"))
    for position, text in ends:
        ax.text(left + position * step, 31, text, ha="center", va="center_baseline", fontsize=10.5)
