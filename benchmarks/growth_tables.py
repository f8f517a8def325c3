"""Growth study: the tables of its page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from benchmarks.growth_error_tables import directions, setting, spectra
from benchmarks.growth_points import Axes, Point
from benchmarks.pages import markdown

Row = Mapping[str, Any]
Parts = Mapping[str, Mapping[str, Row]]
NOT_YET = "*not measured yet*"
AXES = {
    "batches": "mini-batches M",
    "tokens": "tokens per mini-batch",
    "width": "width",
    "layers": "layers",
    "k": "sketch size k",
}
MIB = 2**20
FIGURES = {
    "spectra": ("growth-error", "Errors and plans over the sketch size"),
    "memory": ("growth-memory", "Peak memory beside the bare passes"),
    "time": ("growth-time", "Seconds beside the bare passes"),
    "allocation": ("growth-allocation", "Processor seconds over targets and ranks"),
    "training": ("growth-training", "Steps of training beside uniform LoRA"),
}


def tables(parts: Parts) -> dict[str, str]:
    """Return the tables of the page by name; a part without results says so.

    Args:
        parts: Rows by part and name of the cell.
    """
    makers: dict[str, tuple[str, Callable[[Mapping[str, Row]], str]]] = {
        "error-setting": ("error", setting),
        "spectra": ("error", spectra),
        "directions": ("error", directions),
        "memory": ("memory", memory),
        "time": ("time", seconds),
        "exponents": ("time", lambda _rows: exponents(parts)),
        "allocation": ("allocation", allocation),
        "allocation-ranks": ("allocation", lambda rows: allocation(rows, "ranks")),
        "training": ("training", training),
    }
    return {
        name: _illustrated(name, make(parts[part])) if parts.get(part) else NOT_YET
        for name, (part, make) in makers.items()
    }


def _illustrated(name: str, table: str) -> str:
    """Put the figure of a table above it; before there are results, there is no file to show."""
    if name not in FIGURES:
        return table
    figure, text = FIGURES[name]
    return f"![{text}](../figures/{figure}.svg)\n\n{table}"


def along(rows: Mapping[str, Row], axis: str, axes: Axes) -> list[Row]:
    """Return the rows whose other sizes are the base's, ascending.

    Args:
        rows: Rows of a part that has points.
        axis: The size that differs.
        axes: The part's points.
    """
    wanted = {vars(axes.base)[axis], *axes.values.get(axis, ())}
    others = [key for key in AXES if key != axis]
    base = vars(axes.base)
    chosen = [
        row
        for row in rows.values()
        if row[axis] in wanted and all(row[key] == base[key] for key in others)
    ]
    return sorted(chosen, key=lambda row: row[axis])


def axes_of(rows: Mapping[str, Row]) -> Axes:
    """Return the points that rows were measured at; the first row is the base."""
    first = next(iter(rows.values()))
    base = Point(**{key: first[key] for key in AXES})
    return Axes(base, {key: tuple({row[key] for row in rows.values()}) for key in AXES})


def memory(rows: Mapping[str, Row]) -> str:
    """Return peaks and saved bytes by size."""
    head = (
        *("axis", "size", "bare passes, MiB", "spectra: more, MiB", "ratio"),
        *("both: more, MiB", "ratio", "saved, spectra, KiB", "saved, both, KiB"),
    )
    lines = []
    for axis, title in AXES.items():
        for row in along(rows, axis, axes_of(rows)):
            bare = row["bare"]
            lines.append(
                (
                    title,
                    f"{row[axis]:,}",
                    f"{bare / MIB:.1f}",
                    *(
                        text
                        for name in ("sketch", "both")
                        for text in (
                            f"{(row[name] - bare) / MIB:.1f}",
                            f"{row[name] / bare:.2f}" if bare else "–",  # too small to see
                        )
                    ),
                    *(f"{row[f'{name}_saved'] / 1024:.1f}" for name in ("sketch", "both")),
                )
            )
    return markdown(head, lines)


def seconds(rows: Mapping[str, Row]) -> str:
    """Return seconds per mini-batch and ratios by size."""
    head = (
        *("axis", "size", "bare, ms per mini-batch", "spectra: ratio", "95 %"),
        *("both: ratio", "95 %", "others' share"),
    )
    lines = []
    for axis, title in AXES.items():
        for row in along(rows, axis, axes_of(rows)):
            cells = [title, f"{row[axis]:,}", f"{1000 * row['bare']:.1f}"]
            for name in ("sketch", "both"):
                cells += [f"{row[f'{name}_ratio']:.3f}", ends(row[f"{name}_interval"])]
            lines.append((*cells, f"{row['others_share']:.0%}"))
    return markdown(head, lines)


def ends(interval: Sequence[float] | None) -> str:
    """Return an interval in words."""
    return "" if interval is None else "{:.3f} to {:.3f}".format(*interval)


def exponents(parts: Parts) -> str:
    """Return fitted exponents: slopes of straight lines through logarithms."""
    asked = (
        ("time", "bare", "seconds, bare passes"),
        ("time", "sketch_extra", "seconds more, spectra"),
        ("time", "both_extra", "seconds more, both"),
        ("memory", "bare", "peak, bare passes"),
        ("memory", "sketch_extra", "peak more, spectra"),
        ("memory", "both_extra", "peak more, both"),
        ("memory", "sketch_saved", "saved, spectra"),
        ("memory", "both_saved", "saved, both"),
    )
    lines = []
    for part, key, title in asked:
        rows = parts.get(part)
        if rows:
            lines.append((title, *(_exponent(rows, axis, key) for axis in AXES)))
    return markdown(("", *AXES.values()), lines)


def _exponent(rows: Mapping[str, Row], axis: str, key: str) -> str:
    chosen = along(rows, axis, axes_of(rows))
    found = exponent([row[axis] for row in chosen], [value_of(row, key) for row in chosen])
    return "" if found is None else f"{found:.2f}"


def value_of(row: Row, key: str) -> float:
    """Return a figure of a row; ``NAME_extra`` is what NAME takes beside the bare passes."""
    if key in row:
        return row[key]
    return row[key.removesuffix("_extra")] - row["bare"]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return b of the power law ``value = a size^b`` that fits the logarithms best.

    Args:
        sizes: Sizes, positive.
        values: Costs.

    Returns:
        The exponent; None for fewer than three sizes, or if a cost is not positive.
    """
    if len(set(sizes)) < 3 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def allocation(rows: Mapping[str, Row], axis: str = "targets") -> str:
    """Return processor seconds by solver, kind and size."""
    first = next(iter(rows.values()))
    sizes = [point[axis] for point in first[axis]]
    head = ("solver", "gains or scores", *(f"{size:,}" for size in sizes), "exponent")
    lines = []
    for row in rows.values():
        points = row[axis]
        known = [point for point in points if point["seconds"]]
        slope = exponent([p[axis] for p in known], [p["seconds"] for p in known]) if known else None
        told = "" if slope is None else f"{slope:.2f}"
        lines.append((row["solver"], row["kind"], *map(_taken, points), told))
    return markdown(head, lines)


def _taken(point: Row) -> str:
    if point["seconds"] is None:
        return "refused" if "refused" in point else "left out"
    return f"{point['seconds']:.3f}"


def training(rows: Mapping[str, Row]) -> str:
    """Return whole steps beside uniform LoRA, by how often something is done."""
    head = (
        *("method", "every", "uniform, ms per step", "ratio", "95 %", "decisions"),
        *("a decision, in steps", "others' share"),
    )
    lines = []
    for row in rows.values():
        one = "" if row["in_steps"] is None else f"{row['in_steps']:.2f}"
        lines.append(
            (
                row["method"],
                f"{row['every']} steps",
                f"{1000 * row['uniform_seconds']:.1f}",
                f"{row['ratio']:.3f}",
                ends(row["interval"]),
                str(row["decisions"]),
                one,
                f"{row['others_share']:.0%}",
            )
        )
    return markdown(head, lines)
