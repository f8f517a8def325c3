"""The approximate gradient before and after the first stage, with the importance of its rows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from gradrank.core.partition import NeuronPartition
from gradrank.report.bands import band_colour, stretches
from gradrank.report.neurons import GradientMap, binned, shares
from gradrank.report.style import colour_map, label_of, log_ticks, safe
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, listed, percent
from gradrank.report.view import Run

MAX_CELLS = 64
_WIDTH, _LEFT, _MAP, _STRIP, _SIDE = 500, 52, 312, 10, 92
_HEAD, _TITLE, _GAP, _FOOT = 44, 24, 14, 32
_LEVELS = 20
# Four decades hold everything that a colour can tell apart.
_DECADES = 4.0
_RECTANGLE = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]


@look()
def gradient_maps(run: Run, name: str, suffix: str = "", named: bool = False) -> Figure | None:
    """Draw the magnitude of a target's approximate gradient in the first and in the last look.

    Args:
        run: The run.
        name: The target.
        suffix: Ends the figure's name when a page shows several.
        named: Whether the title names the run.

    Returns:
        The figure, or None if the run has no map of it. ``data``: per look ``cells`` (averaged
        magnitudes, None where unknown), ``rows`` (their means over the columns, relative to the
        mean of all) and ``top_tenth`` (share of the magnitude in the tenth of rows that holds
        most); ``scale``: the ends of the colours as powers of ten.

    Source:
        PiLoRA, Figure 2 and equations 7 and 8.
    """
    told = run.neurons.maps.get(name) if run.neurons else None
    if told is None:
        return None
    looks = {title: _small(cells) for title, cells in told.looks.items()}
    known = np.concatenate([cells[np.isfinite(cells)] for cells in looks.values()])
    high = math.log10(max(float(known.max()), 1e-300))
    low = max(
        math.log10(max(float(known[known > 0].min(initial=10**high)), 1e-300)), high - _DECADES
    )
    norm = Normalize(low, high if high - low > 1e-9 else low + 1)
    data = {title: _facts(cells) for title, cells in looks.items()}
    drawn = _draw(looks, data, norm, run.splits.get(name))
    caption = (
        f"Mean |G̃| over cells of {_each(told)}, on one logarithmic scale. Horizontal bands are "
        "neurons whose gradient is large for all inputs. Beside each map: the mean of each row "
        "over the mean of the matrix; beyond the broken line (1) a look counts as a hit."
    )
    if name in run.splits:
        caption += " The blue strip shows which rows became dominant."
    title = f"Gradient of {safe(name, 60)}" + (f": {label_of(run)}" if named else "")
    headline = _headline(run, data)
    scale = {"scale": [round(low, 6), round(high, 6)]}
    return finish(
        drawn, f"gradient-map{suffix}", title, caption, {**data, **scale}, headline, tall=True
    )


def _small(cells: np.ndarray) -> np.ndarray:
    """Average a map into at most 64 x 64 cells."""
    return binned(binned(cells, MAX_CELLS).T, MAX_CELLS).T


def _facts(cells: np.ndarray) -> dict[str, Any]:
    filled = np.nan_to_num(cells)
    rows = filled.mean(axis=1)
    mean = float(rows.mean())
    top = np.sort(rows)[::-1][: max(1, round(len(rows) / 10))]
    return {
        "cells": [[None if math.isnan(v) else v for v in row] for row in cells.tolist()],
        "rows": [float(v) / mean if mean else 0.0 for v in rows],
        "top_tenth": float(top.sum() / rows.sum()) if mean else None,
    }


def _draw(
    looks: Mapping[str, np.ndarray],
    data: Mapping[str, Any],
    norm: Normalize,
    split: NeuronPartition | None,
) -> Canvas:
    tall = {title: max(96, 3 * len(cells)) for title, cells in looks.items()}
    height = _HEAD + sum(_TITLE + t + _GAP for t in tall.values()) + _FOOT
    drawn = canvas(_WIDTH, height)
    most = max(1.0, *(value for entry in data.values() for value in entry["rows"]))
    top = _HEAD
    for i, (title, cells) in enumerate(looks.items()):
        top += _TITLE
        bottom = 1 - (top + tall[title]) / height
        box = (_LEFT / _WIDTH, bottom, _MAP / _WIDTH, tall[title] / height)
        ax = drawn.add_axes(box)
        last = i == len(looks) - 1
        _cells(ax, cells, norm, tall[title])
        _frame(ax, title, last)
        if split is not None:
            left = (_LEFT + _MAP + 5) / _WIDTH
            box = (left, bottom, _STRIP / _WIDTH, tall[title] / height)
            _strip(drawn.add_axes(box), shares(split, len(cells)))
        left = (_LEFT + _MAP + _STRIP + 14) / _WIDTH
        side = drawn.add_axes((left, bottom, _SIDE / _WIDTH, tall[title] / height))
        _margin(side, data[title]["rows"], most, last)
        top += tall[title] + _GAP
    _colour_bar(drawn, norm, height)
    return drawn


def _cells(ax: Axes, cells: np.ndarray, norm: Normalize, tall: float) -> None:
    """Draw equal neighbours as one rectangle, and all rectangles of one colour as one path."""
    down, across = cells.shape
    low, high = norm.vmin or 0.0, norm.vmax or 1.0
    with np.errstate(divide="ignore"):
        place = (np.log10(np.maximum(cells, 1e-300)) - low) / (high - low)
    levels = np.clip(np.floor(np.nan_to_num(place) * _LEVELS), -1, _LEVELS - 1)
    levels = np.where(np.isfinite(cells), np.where(cells > 0, np.maximum(levels, 0), -1), -1)
    wide, step = _MAP / across, tall / down
    boxes: dict[int, list[tuple[float, float, float]]] = {}
    for i, row in enumerate(levels.astype(int).tolist()):
        for start, stop, level in stretches(row):
            boxes.setdefault(level, []).append((start * wide, stop * wide, i * step))
    colours = colour_map("viridis")
    for level, found in sorted(boxes.items()):
        corners = [((a, y), (b, y), (b, y + step), (a, y + step), (a, y)) for a, b, y in found]
        path = Path(np.array(corners).reshape(-1, 2), np.tile(_RECTANGLE, len(corners)))
        colour = colours((level + 0.5) / _LEVELS) if level >= 0 else "#eeeeee"
        # The edge closes the hairlines that renderers leave between neighbours.
        ax.add_artist(PathPatch(path, facecolor=colour, edgecolor=colour, linewidth=0.4))
    ax.set_xlim(0, _MAP)
    ax.set_ylim(tall, 0)


def _frame(ax: Axes, title: str, last: bool) -> None:
    ax.set_title(title, pad=6)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_ylabel("output neurons")
    if last:
        ax.set_xlabel("input features")


def _strip(ax: Axes, values: np.ndarray) -> None:
    ax.set_xlim(0, 1)
    ax.set_ylim(len(values), 0)
    ax.axis("off")
    levels = np.rint(8 * values).astype(int).tolist()
    for start, stop, level in stretches(levels):
        ax.add_artist(Rectangle((0, start), 1, stop - start, color=band_colour(level), linewidth=0))


def _margin(ax: Axes, rows: list[float], most: float, last: bool) -> None:
    edges = np.arange(len(rows) + 1)
    ax.fill_betweenx(edges, [*rows, rows[-1]], step="post", color="#b9c4d0", linewidth=0)
    ax.axvline(1, color="#333333", linestyle=(0, (4, 2)), linewidth=1.2)
    ax.set_xlim(0, 1.05 * most)
    ax.set_ylim(len(rows), 0)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=3)
    ax.tick_params(length=0, labelbottom=last)
    if last:
        ax.set_xlabel("row / mean")


def _colour_bar(drawn: Canvas, norm: Normalize, height: float) -> None:
    ax = drawn.add_axes(((_WIDTH - 256) / _WIDTH, 1 - 16 / height, 240 / _WIDTH, 10 / height))
    steps = np.linspace(norm.vmin or 0.0, norm.vmax or 1.0, _LEVELS + 1)
    middles = ((steps[:-1] + steps[1:]) / 2)[None, :]
    style = {"cmap": colour_map("viridis"), "norm": norm, "edgecolors": "face"}
    ax.pcolormesh(steps, [0, 1], middles, linewidth=0.5, **style)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_yticks([])
    ax.tick_params(length=0, pad=4)
    if (norm.vmax or 0) - (norm.vmin or 0) >= 1:
        log_ticks(ax.xaxis)
    else:
        ax.set_xticks([])
    ax.text(-0.03, 0.5, "mean |G̃|", transform=ax.transAxes, ha="right", va="center")


def _each(told: GradientMap) -> str:
    shape = next(iter(told.looks.values())).shape
    down = -(-told.rows // min(shape[0], MAX_CELLS))
    across = -(-told.columns // min(shape[1], MAX_CELLS))
    if down == across == 1:
        return "single weights"
    return f"about {count(down)} × {count(across)} weights"


def _headline(run: Run, data: Mapping[str, Any]) -> str:
    parts = [
        f"{percent(entry['top_tenth'])} in the {title}"
        for title, entry in data.items()
        if entry["top_tenth"] is not None
    ]
    if not parts:
        return "The gradient is zero."
    return f"{label_of(run)}: the strongest tenth of the rows holds {listed(parts)}."
