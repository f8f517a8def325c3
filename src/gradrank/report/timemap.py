"""Heat maps of targets over steps: many thin rows, grouped by module type, on a true time axis."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from gradrank.report.heatmap import Scale
from gradrank.report.layout import Layout
from gradrank.report.style import colour_map, log_ticks, safe, whole_ticks
from gradrank.report.svg import canvas
from gradrank.report.text import count

WIDTH = 500
MAX_TARGETS = 1200
# A page stays light: no map draws more cells than this.
_CELLS = 14_000
_LEVELS = 64
_TALL = 800.0
_GAP = 4.0
_HEAD, _FOOT, _RIGHT = 46, 42, 22
_RECTANGLE = np.array([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY])


@dataclass(frozen=True)
class Lane:
    """One row of a map: a target and where it is drawn.

    Attributes:
        name: Full name of the target.
        group: Its module type.
        layer: Its layer's number, or "".
        top: Distance of its upper edge from the top, in pixels.
        bottom: Distance of its lower edge from the top, in pixels.
    """

    name: str
    group: str
    layer: str
    top: float
    bottom: float


def lanes(names: Sequence[str], layout: Layout) -> list[Lane]:
    """Stack targets: module types in model order, and inside each the layers downwards.

    Args:
        names: Target names; the first ``MAX_TARGETS`` in the order of the map are drawn.
        layout: Where each target stands.

    Returns:
        The rows, from the top.
    """
    # One target per row of the layout and column of it: the pair orders them all.
    ordered = sorted(names, key=lambda name: layout.places[name][::-1])[:MAX_TARGETS]
    room = min(18.0, max(1.0, _TALL / max(1, len(ordered))))
    labels = layout.column_labels
    rows: list[Lane] = []
    top = 0.0
    for name in ordered:
        group = layout.row_of(name)
        if rows and rows[-1].group != group and room > 1:
            top += _GAP
        depth = labels[layout.places[name][0]]
        rows.append(Lane(name, group, "" if depth == "–" else depth, top, top + room))
        top += room
    return rows


def most_columns(targets: int) -> int:
    """Return how many columns a map of so many targets may have.

    Args:
        targets: Number of rows.

    Returns:
        Between 12 and 160.
    """
    return max(12, min(160, _CELLS // max(1, targets)))


def evenly(amount: int, most: int) -> list[int]:
    """Choose positions at even distance, the first and the last among them.

    Args:
        amount: How many there are.
        most: How many to keep, at least 2.

    Returns:
        Positions, rising; all of them if they are few.

    Examples:
        >>> evenly(3, 5), evenly(9, 3)
        ([0, 1, 2], [0, 4, 8])
    """
    if amount <= most:
        return list(range(amount))
    return sorted({round(i * (amount - 1) / (most - 1)) for i in range(most)})


def time_map(
    rows: Sequence[Lane],
    edges: Sequence[float],
    values: Mapping[str, Sequence[float | None]],
    scale: Scale,
    span: tuple[float, float],
) -> tuple[Canvas, dict[str, Any]]:
    """Draw one row per target and one column per stretch of steps.

    Args:
        rows: From :func:`lanes`.
        edges: Steps at which columns begin, and the end of the last.
        values: Per target one value per column; None leaves a cell empty.
        scale: The colours.
        span: First and last step of the axis; columns outside widen it.

    Returns:
        The canvas and what was drawn: ``targets``, ``edges`` and ``cells`` (row by row).
    """
    left = 42.0 + 7.4 * max(len(safe(row.group, 20)) for row in rows)
    tall = max(rows[-1].bottom, 70.0)
    height = _HEAD + tall + _FOOT
    drawn = canvas(WIDTH, height)
    box = (left / WIDTH, _FOOT / height, (WIDTH - left - _RIGHT) / WIDTH, tall / height)
    ax = drawn.add_axes(box)
    ax.set_xlim(min(span[0], edges[0]), max(span[1], edges[-1]))
    ax.set_ylim(tall, 0)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0, labelsize=12)
    ax.set_yticks([])
    norm = Normalize(scale.low, scale.high if scale.high - scale.low > 1e-9 else scale.low + 1)
    _cells(ax, rows, edges, values, scale, norm)
    _labels(ax, rows, left)
    whole_ticks(ax, "x", 6)
    ax.xaxis.set_major_formatter(lambda value, _: count(value))
    ax.set_xlabel("step")
    _colour_bar(drawn, left, scale, norm, height)
    data = {
        "targets": [row.name for row in rows],
        "edges": list(edges),
        "cells": [list(values[row.name]) for row in rows],
    }
    return drawn, data


def _cells(
    ax: Axes,
    rows: Sequence[Lane],
    edges: Sequence[float],
    values: Mapping[str, Sequence[float | None]],
    scale: Scale,
    norm: Normalize,
) -> None:
    """Draw equal neighbours as one rectangle, and all rectangles of one colour as one path."""
    found: dict[float, list[tuple[float, float, Lane]]] = {}
    for row in rows:
        for start, stop, level in _stretches([_level(v, scale) for v in values[row.name]]):
            found.setdefault(level, []).append((edges[start], edges[stop], row))
    colours = colour_map(scale.colours)
    seam = min(0.8, 0.25 * (rows[0].bottom - rows[0].top))
    for level, boxes in sorted(found.items()):
        corners = [
            ((a, row.top), (b, row.top), (b, row.bottom), (a, row.bottom), (a, row.top))
            for a, b, row in boxes
        ]
        path = Path(np.array(corners).reshape(-1, 2), np.tile(_RECTANGLE, len(corners)))
        colour = colours(norm(level))
        # The edge closes the hairlines that renderers leave between neighbours.
        style = {"facecolor": colour, "edgecolor": colour, "linewidth": seam}
        patch = PathPatch(path, clip_on=False, **style)
        ax.add_patch(patch)


def _level(value: float | None, scale: Scale) -> float | None:
    """Return the value that a cell's colour stands for: itself, or the middle of its level."""
    if value is None or value < scale.low:
        return None if value is None else scale.low - 1
    width = (scale.high - scale.low) / _LEVELS
    if (scale.numbers and width < 1) or width <= 0:
        return value
    return scale.low + (min(int((value - scale.low) / width), _LEVELS - 1) + 0.5) * width


def _stretches(levels: Sequence[float | None]) -> list[tuple[int, int, float]]:
    result: list[tuple[int, int, float]] = []
    for i, level in enumerate(levels):
        if level is None:
            continue
        if result and result[-1][1] == i and result[-1][2] == level:
            result[-1] = (result[-1][0], i + 1, level)
        else:
            result.append((i, i + 1, level))
    return result


def _labels(ax: Axes, rows: Sequence[Lane], left: float) -> None:
    """Name each module type beside its rows, and the layers at both ends of it."""
    groups: dict[str, list[Lane]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    free = -math.inf
    width = WIDTH - left - _RIGHT
    for group, members in groups.items():
        top, bottom = members[0].top, members[-1].bottom
        middle = (top + bottom) / 2
        if middle - 6 < free:
            continue
        free = middle + 7
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "ha": "right"}
        text = safe(group, 20)
        ax.text(-(30 if members[0].layer else 8) / width, middle, text, fontsize=12.5, **place)
        small = {**place, "fontsize": 11, "color": "#666666"}
        wide = members[0].bottom - members[0].top
        every = 1 if wide >= 12 else len(members) - 1
        if bottom - top >= 27 or len(members) == 1:
            for i, row in enumerate(members):
                if every == 0 or i % every == 0:
                    y = min(max((row.top + row.bottom) / 2, top + 6), max(bottom - 6, top + 6))
                    ax.text(-7 / width, y, row.layer, **small)


def _colour_bar(drawn: Canvas, left: float, scale: Scale, norm: Normalize, height: float) -> None:
    """Draw the colours above the map, where they cost no width."""
    long = min(200.0, (WIDTH - left - _RIGHT) * 0.7)
    box = ((WIDTH - _RIGHT - long) / WIDTH, 1 - 14 / height, long / WIDTH, 10 / height)
    ax = drawn.add_axes(box)
    steps = np.linspace(norm.vmin or 0.0, norm.vmax or 1.0, 49)
    middles = ((steps[:-1] + steps[1:]) / 2)[None, :]
    style = {"cmap": colour_map(scale.colours), "norm": norm, "edgecolors": "face"}
    ax.pcolormesh(steps, [0, 1], middles, linewidth=0.5, **style)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_yticks([])
    ax.tick_params(length=0, pad=4)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=scale.numbers))
    if scale.log:
        log_ticks(ax.xaxis)
    ax.text(-8 / long, 0.5, scale.label, transform=ax.transAxes, ha="right", va="center")
