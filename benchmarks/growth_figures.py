"""Growth study: its figures. A part without results has none."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from benchmarks.growth_error_tables import average, pooled
from benchmarks.growth_tables import AXES, along, axes_of
from matplotlib.axes import Axes as Plot
from matplotlib.ticker import NullLocator

from gradrank.report.style import Mark, percent_ticks, type_marks
from gradrank.report.svg import Figure, canvas, finish, look

Row = Mapping[str, Any]
Parts = Mapping[str, Mapping[str, Row]]
_WIDTH = 900
DEFAULT = 128
"""The default sketch size."""
NAMES = {"sketch": "spectra", "both": "spectra and mean gradients"}


def figures(parts: Parts) -> list[Figure]:
    """Draw every figure for which there are results, in the order of the page.

    Args:
        parts: Rows by part and name of the cell.
    """
    makers = {
        "error": errors,
        "memory": memory,
        "time": seconds,
        "allocation": allocation,
        "training": training,
    }
    return [make(parts[part]) for part, make in makers.items() if parts.get(part)]


@look()
def errors(rows: Mapping[str, Row]) -> Figure:
    """Draw what a sketch size buys: Gram error, effective ranks, plans."""
    drawn = canvas(_WIDTH, 360)
    plots = drawn.subplots(1, 3)
    found = pooled(rows, "spectra", "sketch", "k")
    kinds = {"fold": "sign fold (the library's)", "gauss": "Gaussian, stored whole"}
    marks, data = type_marks(list(kinds)), {}
    for kind, label in kinds.items():
        sizes = [k for name, k in found if name == kind]
        entries = [found[kind, k] for k in sizes]
        grams = [mean(entry["gram_error"] for entry in of) for of in entries]
        equal = [average([e["0.9"] for e in of], "equal") for of in entries]
        plans = [average([e["0.9"] for e in of], "plan_elsewhere") for of in entries]
        data[kind] = {"k": sizes, "gram_error": grams, "equal": equal, "elsewhere": plans}
        for plot, values in zip(plots, (grams, equal, plans), strict=True):
            _line(plot, sizes, values, marks[kind], label)
    other = [row["other_batches"] for row in rows.values()]
    levels = {
        "equal": average([row["0.9"] for row in other], "equal"),
        "elsewhere": average([row["0.9"] for row in other], "plan_elsewhere"),
    }
    for plot, level in zip(plots[1:], levels.values(), strict=True):
        plot.axhline(level, color="#6b6b6b", linestyle=(0, (5, 2)), label="exact, other batches")
    for plot in plots:
        plot.axvline(DEFAULT, color="#bbbbbb", linewidth=1, zorder=0)
        sizes = data["fold"]["k"]
        _doubling(plot, sizes)
        plot.set(xlabel="sketch size k", ylim=(0, None))
        percent_ticks(plot.yaxis)
    plots[0].set(title="Error of Gram matrices")
    plots[1].set(title="Effective rank equal", ylim=(0, 1.02))
    plots[2].set(title="Parameters elsewhere")
    drawn.tight_layout(rect=(0, 0, 1, 0.9))
    handles, labels = plots[1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="upper left", ncols=3)
    caption = (
        "Against exact gradients of the same mini-batches, effective ranks at energy 0.9, plans at "
        "uniform:8. Dashed: exact gradients of other mini-batches. Vertical line: the default."
    )
    data["other_batches"] = levels
    return finish(drawn, "growth-error", "What a sketch size buys", caption, data)


@look()
def memory(rows: Mapping[str, Row]) -> Figure:
    """Draw peak memory beside the bare passes along each axis."""
    return _beside(
        rows,
        lambda row, name: row[name] / row["bare"] if row["bare"] else math.nan,  # too small
        "growth-memory",
        "Peak memory of measuring, by the peak of the bare passes",
        "One process each; weights included. One size grows, the others stay as in the base.",
    )


@look()
def seconds(rows: Mapping[str, Row]) -> Figure:
    """Draw seconds beside the bare passes along each axis."""
    return _beside(
        rows,
        lambda row, name: row[f"{name}_ratio"],
        "growth-time",
        "Seconds of measuring, by the seconds of the bare passes",
        "Turn by turn in one process. One size grows, the others stay as in the base.",
    )


def _beside(rows: Mapping[str, Row], value: Any, name: str, title: str, caption: str) -> Figure:
    drawn = canvas(_WIDTH, 330)
    plots = drawn.subplots(1, len(AXES), sharey=True)
    marks, data = type_marks(list(NAMES)), {}
    for plot, (axis, text) in zip(plots, AXES.items(), strict=True):
        chosen = along(rows, axis, axes_of(rows))
        sizes = [row[axis] for row in chosen]
        for key, label in NAMES.items():
            values = [value(row, key) for row in chosen]
            data[f"{text}, {label}"] = {"size": sizes, "ratio": values}
            _line(plot, sizes, values, marks[key], label)
        plot.axhline(1, color="#6b6b6b", linewidth=1)
        _doubling(plot, sizes, most=3)
        plot.set(xlabel=text.replace(" per ", "\nper "))
    drawn.tight_layout(rect=(0, 0, 1, 0.9))
    handles, labels = plots[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="upper left", ncols=2)
    return finish(drawn, name, title, caption, data)


@look()
def allocation(rows: Mapping[str, Row]) -> Figure:
    """Draw processor seconds over targets and over ranks."""
    drawn = canvas(_WIDTH, 400)
    plots = drawn.subplots(1, 2, sharey=True)
    # Greedy lines would lie on top of one another; the table has them.
    rows = {name: row for name, row in rows.items() if row["solver"] != "greedy"}
    marks, data = type_marks(list(rows)), {}
    first = next(iter(rows.values()))
    texts = {
        "targets": f"targets ({first['rank']} ranks)",
        "ranks": f"ranks ({first['count']} targets)",
    }
    for plot, (axis, text) in zip(plots, texts.items(), strict=True):
        for name, row in rows.items():
            known = [p for p in row[axis] if p["seconds"]]
            sizes = [p[axis] for p in known]
            taken = [p["seconds"] for p in known]
            data[f"{name}, {axis}"] = {"size": sizes, "seconds": taken}
            _line(plot, sizes, [float(np.log10(t)) for t in taken], marks[name], name)
        plot.set(xlabel=text)
        _doubling(plot, [p[axis] for p in first[axis]])
    low, high = plots[0].get_ylim()
    ticks = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    plots[0].set_yticks(list(ticks), [f"{10.0**tick:g}" for tick in ticks])
    plots[0].set(ylabel="processor seconds")
    drawn.tight_layout(rect=(0, 0, 1, 0.8))
    handles, labels = plots[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="upper left", ncols=3)
    caption = "Shapes of Llama-3-8B. A kind that was slow at one size was not tried at the next."
    return finish(drawn, "growth-allocation", "Seconds of an allocation", caption, data)


@look()
def training(rows: Mapping[str, Row]) -> Figure:
    """Draw whole steps beside uniform LoRA over how often something is done."""
    drawn = canvas(_WIDTH, 340)
    texts = {"gard-dynamic": "steps between decisions (τ)", "igu": "steps between looks (K)"}
    plots = drawn.subplots(1, len(texts))
    marks, data = type_marks(list(texts)), {}
    for plot, (method, text) in zip(plots, texts.items(), strict=True):
        chosen = sorted(
            (row for row in rows.values() if row["method"] == method), key=lambda row: row["every"]
        )
        every, ratios = [row["every"] for row in chosen], [row["ratio"] for row in chosen]
        data[method] = {"every": every, "ratio": ratios}
        _line(plot, every, ratios, marks[method], method)
        for row in chosen:
            if row["interval"]:
                plot.plot([row["every"]] * 2, row["interval"], color=marks[method].color)
        plot.axhline(1, color="#6b6b6b", linewidth=1)
        _doubling(plot, every)
        plot.set(xlabel=text, title=method, ylabel="seconds by uniform LoRA's")
    drawn.tight_layout()
    caption = "Turn by turn with uniform LoRA of the same (final) budget. Bars: 95 % intervals."
    return finish(drawn, "growth-training", "Steps of training", caption, data)


def _line(plot: Plot, x: Sequence[float], y: Sequence[float], mark: Mark, label: str) -> None:
    plot.plot(
        x, y, color=mark.color, marker=mark.marker, linestyle=mark.line, markersize=5, label=label
    )


def _doubling(plot: Plot, sizes: Sequence[int], most: int = 8) -> None:
    """Use a logarithmic axis with ticks at the sizes themselves."""
    if not sizes:
        return
    plot.set_xscale("log")
    step = -(-len(sizes) // most)
    shown = list(sizes)[::step]
    plot.set_xticks(shown, [f"{size:,}" for size in shown])
    plot.xaxis.set_minor_locator(NullLocator())
