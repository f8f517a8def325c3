"""Heat maps of layers by module type, one panel per run, on one scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from gradrank.report.layout import Layout
from gradrank.report.style import colour_map, ink_on, log_ticks, safe
from gradrank.report.svg import canvas

MAX_ROWS = 48
_ROW = 23
_TITLE = 30
_FOOT = 40
_RIGHT = 92


@dataclass(frozen=True)
class Scale:
    """How values become colours.

    Attributes:
        low: Value at the dark end; values below it are drawn light grey (rank 0).
        high: Value at the bright end.
        label: What the colours mean, with its unit.
        colours: Name of the colour map.
        log: Whether the cells hold log10 of the quantity.
        numbers: Whether cells show their (whole) number where there is room for it.
    """

    low: float
    high: float
    label: str
    colours: str = "viridis"
    log: bool = False
    numbers: bool = True


def heat_map(
    panels: Mapping[str, Mapping[str, float]], layout: Layout, scale: Scale, titled: bool = True
) -> tuple[Canvas, dict[str, Any]]:
    """Draw one panel per entry, layers across and module types down.

    Args:
        panels: Values by target name, by panel title.
        layout: Where each target stands.
        scale: The colours.
        titled: Whether each panel shows its title.

    Returns:
        The canvas and what was drawn: ``rows``, ``columns``, and per panel the cells (None where
        there is nothing).
    """
    present = {layout.places[name][1] for values in panels.values() for name in values}
    kept = sorted(present)[:MAX_ROWS]
    rows = [layout.rows[i] for i in kept]
    grids = {title: layout.grid(values) for title, values in panels.items()}
    cells = {title: [grid[i] for i in kept] for title, grid in grids.items()}
    left = 24 + 7.4 * max(len(safe(row, 24)) for row in rows)
    cell = max(8.0, min(48.0, (1040 - left - _RIGHT) / len(layout.columns)))
    width = max(480.0, left + cell * len(layout.columns) + _RIGHT)
    head = _TITLE if titled else 6
    # Few rows still need the height of a colour bar with its label.
    spare = max(0, 96 - _ROW * len(rows))
    block = head + _ROW * len(rows) + (spare if len(panels) == 1 else 0)
    stacked = len({stack for stack, _ in layout.columns}) > 1
    foot = _FOOT + (16 if stacked else 0)
    height = block * len(panels) + foot * len(panels)
    drawn = canvas(width, height)
    norm = Normalize(scale.low, scale.high if scale.high - scale.low > 1e-9 else scale.low + 1)
    for position, (title, grid) in enumerate(cells.items()):
        bottom = height - position * (block + foot) - head - _ROW * len(rows)
        box = (left, bottom, cell * len(layout.columns), _ROW * len(rows))
        ax = drawn.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        ax.set_title(title if titled else "", pad=7)
        _cells(ax, grid, scale, norm, cell)
        _columns(ax, layout, cell, _ROW * len(rows))
        ax.set_yticks(range(len(rows)), [safe(row, 24) for row in rows])
        if position == 0:
            _colour_bar(drawn, box, scale, norm, (width, height))
    return drawn, {"rows": rows, "columns": layout.column_labels, "panels": cells}


def _cells(
    ax: Axes, grid: list[list[float | None]], scale: Scale, norm: Normalize, room: float
) -> None:
    """Draw the cells, with numbers where a cell is wide enough (``room`` pixels)."""
    values = np.array([[math.nan if v is None else v for v in row] for row in grid], dtype=float)
    colours = colour_map(scale.colours)
    ax.pcolormesh(
        np.arange(values.shape[1] + 1) - 0.5,
        np.arange(values.shape[0] + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=colours,
        norm=norm,
        edgecolors="white",
        linewidth=1.0,
    )
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    known = list(zip(*np.nonzero(np.isfinite(values)), strict=True))
    longest = max((len(f"{values[cell]:.0f}") for cell in known), default=0)
    if not scale.numbers or room < 6 + 7 * longest:
        return
    for row, column in known:
        value = values[row, column]
        ink = "#777777" if value < scale.low else ink_on(colours(norm(value)))
        text = f"{value:.0f}"
        ax.text(column, row, text, ha="center", va="center_baseline", fontsize=10.5, color=ink)


def _columns(ax: Axes, layout: Layout, cell: float, tall: float) -> None:
    labels = layout.column_labels
    widest = max(len(label) for label in labels) * 8 + 8
    fits = math.ceil(widest / cell)
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n >= fits), fits)
    shown = [
        i for i, (_, depth) in enumerate(layout.columns) if depth is None or depth % every == 0
    ]
    ax.set_xticks(shown, [labels[i] for i in shown])
    stacks = [stack for stack, _ in layout.columns]
    if len(set(stacks)) == 1:
        ax.set_xlabel("layer" if stacks[0] else "targets without a layer number")
        return
    for stack in dict.fromkeys(stacks):
        first, last = stacks.index(stack), len(stacks) - 1 - stacks[::-1].index(stack)
        middle = ((first + last + 1) / 2) / len(stacks)
        name = safe(stack, max(4, int((last - first + 1) * cell / 7))) if stack else "other"
        ax.text(middle, -30 / tall, name, transform=ax.transAxes, ha="center", va="top")
        if first:
            ax.axvline(first - 0.5, color="#333333", linewidth=1.5)


def _colour_bar(
    drawn: Canvas,
    box: tuple[float, float, float, float],
    scale: Scale,
    norm: Normalize,
    size: tuple[float, float],
) -> None:
    left, bottom, width, tall = box
    top = bottom + tall
    tall = max(tall, min(96.0, top - 8))
    bottom = top - tall
    ax = drawn.add_axes(
        (
            (left + width + 18) / size[0],
            bottom / size[1],
            12 / size[0],
            tall / size[1],
        )
    )
    steps = np.linspace(norm.vmin or 0.0, norm.vmax or 1.0, 65)
    middles = ((steps[:-1] + steps[1:]) / 2)[:, None]
    # Edges in the fill colour close the hairlines that renderers leave between cells.
    ax.pcolormesh(
        [0, 1],
        steps,
        middles,
        cmap=colour_map(scale.colours),
        norm=norm,
        edgecolors="face",
        linewidth=0.5,
    )
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.yaxis.set_label_position("right")
    ax.set_ylabel(scale.label)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=scale.numbers))
    if scale.log:
        log_ticks(ax.yaxis)
