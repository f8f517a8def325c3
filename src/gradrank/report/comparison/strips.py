"""Strips: panels above each other with one row per method, and the marks that methods have."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from gradrank.report.comparison.view import View, label
from gradrank.report.style import MAX_TYPES, Mark, add_legend, legend_shape, safe, type_marks
from gradrank.report.svg import canvas

WIDTH = 500
UNMATCHED = "†"
_TITLE, _AXIS, _FOOT = 28, 24, 26


@dataclass(frozen=True)
class Strip:
    """One panel: its title and its rows, from the top."""

    title: str
    rows: Sequence[str]


def strips(
    view: View,
    panels: Sequence[Strip],
    x_labels: Sequence[str],
    legend: tuple[Sequence[Any], Sequence[str]] | None = None,
    right: int = 16,
    roomy: bool = False,
) -> tuple[Canvas, list[Axes]]:
    """Put panels above each other; the rows are methods, at whole numbers from 0 on top.

    Args:
        view: Tells which methods are not held to the budget; those are marked.
        panels: The panels.
        x_labels: What each panel's axis is; a single one stands below the last, and all panels
            share their axis.
        legend: Handles and labels of a legend above all panels.
        right: Free room at the right, in pixels.
        roomy: Whether rows are higher, for curves inside them.

    Returns:
        The canvas and its axes.
    """
    most = max(len(panel.rows) for panel in panels)
    tall = (20.0 if most <= 20 else 16.0 if most <= 35 else 13.0) + (8.0 if roomy else 0.0)
    names = {row: method_text(view, row) for panel in panels for row in panel.rows}
    left = 20 + round(0.58 * text_size(tall) * max(len(name) for name in names.values()))
    shape = legend_shape(legend[1], WIDTH - 20, 5) if legend else (0, 1)
    head = 8 + 19 * shape[0] if legend else 0
    own = len(x_labels) > 1
    heights = [_TITLE + tall * len(p.rows) + _AXIS + (_FOOT if own else 0) for p in panels]
    height = head + sum(heights) + (0 if own else _FOOT)
    drawn = canvas(WIDTH, height)
    drawn_axes: list[Axes] = []
    top = float(head)
    for i, panel in enumerate(panels):
        inner = tall * len(panel.rows)
        bottom = height - top - _TITLE - inner
        box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, inner / height)
        ax = drawn.add_axes(box, sharex=drawn_axes[0] if drawn_axes and not own else None)
        _dress(ax, panel, names, tall)
        if own or i == len(panels) - 1:
            ax.set_xlabel(x_labels[i if own else 0])
        drawn_axes.append(ax)
        top += heights[i]
    if legend:
        add_legend(drawn, *legend, shape, left=14, handlelength=1.6)
    return drawn, drawn_axes


def _dress(ax: Axes, panel: Strip, names: Mapping[str, str], tall: float) -> None:
    bands = [(row - 0.5, 1.0) for row in range(0, len(panel.rows), 2)]
    ax.add_artist(_bands(ax, bands))
    ax.set_ylim(len(panel.rows) - 0.5, -0.5)
    ax.tick_params(axis="x", length=0)
    # Plain text: a tick per row takes ten times as long.
    ax.yaxis.set_visible(False)
    size = text_size(tall)
    where: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": "right"}
    for place, row in enumerate(panel.rows):
        style = {"va": "center_baseline", "fontsize": size, "color": "#222222"}
        ax.text(-0.012, place, names[row], **where, **style)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    ax.set_title(safe(panel.title, 48), fontsize=11.5)


def _bands(ax: Axes, bands: Sequence[tuple[float, float]]) -> PathPatch:
    """Return grey stripes behind every second row, as one path."""
    corners = [
        ((0.0, y), (1.0, y), (1.0, y + tall), (0.0, y + tall), (0.0, y)) for y, tall in bands
    ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    path = Path(np.array(corners).reshape(-1, 2), np.tile(codes, len(corners)))
    placed: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "zorder": 0}
    return PathPatch(path, facecolor="#f4f5f7", linewidth=0, **placed)


def text_size(tall: float) -> float:
    """Return the size of a row's label.

    Args:
        tall: Height of a row, in pixels.

    Returns:
        The size, in pixels.
    """
    return 11.0 if tall >= 18 else 10.0 if tall >= 15 else 9.0


def method_text(view: View, method: str) -> str:
    """Return a method's label for a figure; a dagger marks those not held to the budget.

    Args:
        view: The comparison.
        method: The method.

    Returns:
        The text.
    """
    text = safe(label(method), 22)
    return f"{text} {UNMATCHED}" if method in view.unmatched else text


def method_marks(view: View) -> dict[str, Mark]:
    """Choose a mark per method: black for the reference, colour and shape for the others.

    Args:
        view: The comparison.

    Returns:
        The marks; up to 84 methods differ in colour or shape.
    """
    base = list(type_marks([str(i) for i in range(MAX_TYPES)]).values())
    others = [method for method in view.methods if method != view.reference]
    marks = {view.reference: Mark("#000000", "D", "-", "")}
    for i, method in enumerate(others):
        turn = i // len(base)
        marks[method] = replace(base[(i + turn) % 7], marker=base[i % len(base)].marker)
    return marks


def drawable(values: Iterable[float | None]) -> list[float]:
    """Return values with gaps where there is nothing.

    Args:
        values: The values.

    Returns:
        The values, NaN for None.
    """
    return [math.nan if value is None else value for value in values]


def gapped(
    segments: Iterable[tuple[float, float]], at: Iterable[float]
) -> tuple[list[float], list[float]]:
    """Return many separate segments as one line with gaps, which is a tenth of the bytes.

    Args:
        segments: Start and end of each segment.
        at: Its place on the other axis.

    Returns:
        Coordinates along the segments and across them.
    """
    along, across = [], []
    for (low, high), place in zip(segments, at, strict=True):
        along += [low, high, math.nan]
        across += [place, place, math.nan]
    return along, across


def reach(values: Sequence[float], most: float = 6.0) -> float:
    """Return how far from zero an axis goes, so that a few outliers do not flatten the rest.

    Args:
        values: What is drawn.
        most: Values beyond this many times the 80th percentile of the sizes are left outside.

    Returns:
        The limit; above 0.
    """
    sizes = sorted(abs(value) for value in values)
    if not sizes or sizes[-1] == 0:
        return 1.0
    usual = sizes[min(len(sizes) - 1, int(0.8 * len(sizes)))]
    return 1.08 * (sizes[-1] if not usual or sizes[-1] <= most * usual else 0.6 * most * usual)
