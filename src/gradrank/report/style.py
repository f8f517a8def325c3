"""Colours, markers, line styles and hatches: never colour alone (Okabe and Ito's palette)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gradrank.report.text import clean, power_of_ten, shorten
from gradrank.report.view import BASELINE, Run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#444444")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*")
# Straight lines only: SVG spells out every dot of a dotted hatch, a hundred kilobytes each.
_HATCHES = ("", "///", "--", "\\\\\\", "xx", "||", "++", "/", "-----", "\\", "xxxx", "||||")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))
MAX_TYPES = len(_MARKERS)
OTHER = "other types"


@dataclass(frozen=True, slots=True)
class Mark:
    """How one module type or one run is drawn."""

    color: str
    marker: str
    line: Any
    hatch: str


def type_marks(rows: Sequence[str]) -> dict[str, Mark]:
    """Choose a mark per module type.

    Args:
        rows: Module types, in model order.

    Returns:
        A mark for each of the first types; the rest share the entry ``OTHER``.
    """
    shown = rows if len(rows) <= MAX_TYPES else rows[: MAX_TYPES - 1]
    marks = {row: _mark(i) for i, row in enumerate(shown)}
    if len(rows) > len(shown):
        marks[OTHER] = Mark("#999999", "*", "-", "/-")
    return marks


def type_key(row: str, marks: dict[str, Mark]) -> str:
    """Return under which entry a module type is drawn.

    Args:
        row: The module type.
        marks: From :func:`type_marks`.

    Returns:
        The type itself, or ``OTHER``.
    """
    return row if row in marks else OTHER


def run_marks(runs: Sequence[Run]) -> dict[str, Mark]:
    """Choose a mark per run: grey for the baseline, one colour per method.

    Args:
        runs: The runs.

    Returns:
        A mark per label; runs of one method share the colour and differ in their marker.
    """
    methods = list(dict.fromkeys(run.method for run in runs if run.method != BASELINE))
    marks = {}
    for position, run in enumerate(runs):
        marker = _MARKERS[position % len(_MARKERS)]
        if run.method == BASELINE:
            marks[run.label] = Mark("#6b6b6b", marker, _LINES[1], "")
        else:
            i = methods.index(run.method)
            line = (_LINES[0], *_LINES[2:])[i % (len(_LINES) - 1)]
            hatch = _HATCHES[(i + 1) % len(_HATCHES)]
            marks[run.label] = Mark(_COLOURS[i % len(_COLOURS)], marker, line, hatch)
    return marks


def label_of(run: Run) -> str:
    """Return a run's label for a figure; an unfinished run says so everywhere.

    Args:
        run: The run.

    Returns:
        The label.
    """
    return run.label if run.finished else f"{run.label} ({run.status})"


def legend_shape(labels: Sequence[str], room: float, most: int) -> tuple[int, int]:
    """Return how many rows and columns a legend takes.

    Args:
        labels: Its texts.
        room: Width that it may take, in pixels.
        most: Greatest number of columns.

    Returns:
        ``(rows, columns)``.
    """
    if not labels:
        return 0, 1
    if len(labels) <= most and sum(50 + 6.8 * len(label) for label in labels) <= room:
        return 1, len(labels)
    entry = 60 + 6.8 * max(len(label) for label in labels)
    columns = max(1, min(most, int(room / entry)))
    rows = -(-len(labels) // columns)
    return rows, -(-len(labels) // rows)


def add_legend(
    drawn: Canvas,
    handles: Sequence[Any],
    labels: Sequence[str],
    shape: tuple[int, int],
    left: float,
    **style: Any,
) -> None:
    """Put a legend at the top left of a canvas, read along its rows.

    Args:
        drawn: The canvas.
        handles: Sample lines or patches.
        labels: Their texts.
        shape: Rows and columns, from :func:`legend_shape`.
        left: Left edge, in pixels.
        **style: Further arguments of a matplotlib legend.
    """
    # matplotlib drops a label that starts with an underscore.
    texts = [" " + label if label.startswith("_") else label for label in labels]
    # matplotlib fills columns first.
    rows, columns = shape
    order = [row * columns + column for column in range(columns) for row in range(rows)]
    order = [i for i in order if i < len(texts)]
    drawn.legend(
        [handles[i] for i in order],
        [texts[i] for i in order],
        loc="upper left",
        bbox_to_anchor=(left / (drawn.get_figwidth() * 72), 1.0),
        borderaxespad=0.3,
        ncols=columns,
        **style,
    )


def safe(text: str, limit: int = 26) -> str:
    """Return text for a figure: cleaned and short.

    Args:
        text: Untrusted text.
        limit: Longest result, in characters.

    Returns:
        The text.
    """
    return shorten(clean(text), limit)


def ink_on(rgba: Sequence[float]) -> str:
    """Return black or white, whichever can be read on a colour.

    Args:
        rgba: Colour components in [0, 1].

    Returns:
        A colour.

    Source:
        WCAG 2.2, relative luminance; the split lies where both contrasts are equal.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def colour_map(name: str) -> Any:
    """Return a colour map whose low end is a light grey, for rank 0.

    Args:
        name: Name of a perceptually uniform map.

    Returns:
        The map.
    """
    return mpl.colormaps[name].with_extremes(under="#eeeeee", bad="#ffffff00")


def whole_ticks(ax: Axes, axis: str = "x", most: int = 8) -> None:
    """Put ticks at whole numbers only.

    Args:
        ax: The axes.
        axis: ``x`` or ``y``.
        most: Greatest number of intervals.
    """
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    chosen.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def percent_ticks(axis: Any) -> None:
    """Write fractions as percentages.

    Args:
        axis: A matplotlib axis.
    """
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def log_ticks(axis: Any) -> None:
    """Write powers of ten with superscript characters (math markup is off).

    Args:
        axis: A matplotlib axis that shows log10 of its quantity.
    """
    axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(value))))


def _mark(i: int) -> Mark:
    return Mark(
        _COLOURS[i % len(_COLOURS)],
        _MARKERS[i % len(_MARKERS)],
        _LINES[(i // len(_COLOURS)) % len(_LINES)],
        _HATCHES[i % len(_HATCHES)],
    )
