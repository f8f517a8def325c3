"""Panels: one little panel per module type on common axes, or two above one axis of steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from gradrank.report.style import add_legend, legend_shape, safe, whole_ticks
from gradrank.report.svg import canvas
from gradrank.report.text import count

MAX_PANELS = 12
WIDTH = 500
LEFT = 86
_LEFT, _RIGHT, _TOP, _GAP_X, _GAP_Y, _FOOT = 66, 14, 30, 24, 50, 42


def small_multiples(
    titles: Sequence[str],
    draw: Callable[[Axes, str], None],
    x_label: str,
    y_label: str,
    legend: tuple[Sequence[Any], Sequence[str]] | None = None,
    stacked: bool = False,
) -> Canvas:
    """Draw a panel per title, four in a row, sharing both axes.

    Args:
        titles: Panel titles; the caller keeps to ``MAX_PANELS``.
        draw: Called with the axes and the title; draws one panel.
        x_label: Label below the lowest panel of each column.
        y_label: Label left of each row.
        legend: Handles and labels of a legend above all panels, if any.
        stacked: One panel in a row instead, on a canvas of half the width.

    Returns:
        The canvas.
    """
    across = 1 if stacked else min(4, len(titles))
    down = math.ceil(len(titles) / across)
    width = 500.0 if stacked else 1040.0
    panel = (width - _LEFT - _RIGHT - _GAP_X * (across - 1)) / across
    tall = 110.0 if stacked else 150.0 if across > 1 else 190.0
    shape = legend_shape(legend[1] if legend else (), width - _LEFT, 5)
    head = 8 + 19 * shape[0] if legend else 0
    height = head + down * (_TOP + tall) + (down - 1) * (_GAP_Y - _TOP) + _FOOT
    drawn = canvas(width, height)
    first: Axes | None = None
    for i, title in enumerate(titles):
        row, column = divmod(i, across)
        left = _LEFT + column * (panel + _GAP_X)
        bottom = height - head - _TOP - tall - row * (tall + _GAP_Y)
        box = (left / width, bottom / height, panel / width, tall / height)
        ax = drawn.add_axes(box, sharex=first, sharey=first)
        first = first or ax
        draw(ax, title)
        ax.set_title(safe(title, 34))
        ax.tick_params(length=0, labelleft=column == 0, labelbottom=i + across >= len(titles))
        if column == 0:
            ax.set_ylabel(y_label)
        if i + across >= len(titles):
            ax.set_xlabel(x_label)
    if legend:
        add_legend(drawn, *legend, shape, left=_LEFT - 8, handlelength=3.2)
    return drawn


def two_panels(tall: tuple[int, int], legend_rows: int = 0) -> tuple[Canvas, tuple[Axes, Axes]]:
    """Put two panels above each other, for two quantities over the same steps.

    Args:
        tall: Heights in pixels; a second one of 0 hides the lower panel.
        legend_rows: Lines of a legend above them.

    Returns:
        The canvas, ``WIDTH`` wide, and its panels; their values are written as whole numbers.
    """
    head, gap, foot = 10 + 20 * legend_rows, 16 * bool(tall[1]), 44
    height = head + sum(tall) + gap + foot
    drawn = canvas(WIDTH, height)
    left, wide = LEFT / WIDTH, (WIDTH - LEFT - 22) / WIDTH
    low = max(tall[1], 1)
    upper = drawn.add_axes((left, (foot + tall[1] + gap) / height, wide, tall[0] / height))
    lower = drawn.add_axes((left, foot / height, wide, low / height))
    lower.set_visible(bool(tall[1]))
    for ax in (upper, lower):
        ax.tick_params(length=0)
        ax.yaxis.set_major_formatter(lambda value, _: count(value).replace("-", "−"))
    return drawn, (upper, lower)


def step_axis(upper: Axes, lower: Axes, span: tuple[float, float]) -> None:
    """Give both panels the same steps, written below the lowest that is shown.

    Args:
        upper: The upper panel.
        lower: The lower panel.
        span: First and last step.
    """
    shown = [ax for ax in (upper, lower) if ax.get_visible()]
    for ax in shown:
        ax.set_xlim(span[0], span[1] if span[1] > span[0] else span[0] + 1)
        whole_ticks(ax, "x", 6)
        ax.xaxis.set_major_formatter(lambda value, _: count(value))
        ax.tick_params(labelbottom=ax is shown[-1])
    shown[-1].set_xlabel("step")
