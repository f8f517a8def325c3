"""What was paid: the parameter budget, and wall time."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from gradrank.report.layout import Layout
from gradrank.report.style import (
    Mark,
    add_legend,
    label_of,
    legend_shape,
    safe,
    type_key,
    type_marks,
    whole_ticks,
)
from gradrank.report.svg import Figure, canvas, finish, look
from gradrank.report.text import count, listed, percent
from gradrank.report.view import Run, final

_WIDTH = 500
_PARTS = {"measure": "measuring", "train": "training", "eval": "evaluating"}
_WHY = "the record was edited or is damaged"
_PART_MARKS = {
    "measure": Mark("#E69F00", "o", "-", "///"),
    "train": Mark("#0072B2", "s", "-", ""),
    "eval": Mark("#9a9a9a", "^", "-", "--"),
}


@look()
def budget_bar(runs: Sequence[Run], layout: Layout) -> Figure | None:
    """Draw how each run spends its budget over module types, and what it leaves.

    Args:
        runs: The runs.
        layout: Gives the module types.

    Returns:
        The figure, or None without a plan. ``data``: per run ``segments`` (parameters by type),
        ``slack`` and ``budget`` (None if unknown).
    """
    planned = [run for run in runs if run.planned and run.shaped]
    if not planned:
        return None
    marks = type_marks(layout.rows)
    data = {}
    for run in planned:
        segments = dict.fromkeys(marks, 0)
        for name, entry in run.planned.items():
            segments[type_key(layout.row_of(name), marks)] += entry.parameters
        segments = {key: value for key, value in segments.items() if value}
        data[label_of(run)] = {"segments": segments, "slack": run.slack, "budget": run.budget}
    drawn = _stacked(
        {label: entry["segments"] for label, entry in data.items()},
        marks,
        {label: _slack_label(entry) for label, entry in data.items()},
        {label: max(entry["slack"] or 0, 0) for label, entry in data.items()},
        "adapter parameters",
    )
    caption = "Trainable parameters by module type. " + _slack_sentence(planned)
    title = "How the parameter budget is spent" + (", final ranks" if final(planned) else "")
    return finish(drawn, "budget", title, caption, data)


@look()
def cost_bar(runs: Sequence[Run]) -> Figure | None:
    """Draw wall time per run, split into measuring, training and evaluating.

    Args:
        runs: The runs.

    Returns:
        The figure, or None if no time is known. ``data``: seconds per run and part.
    """
    data = {}
    for run in runs:
        known = {part: run.cost.get(f"{part}_seconds", 0.0) for part in _PARTS}
        known = {part: value for part, value in known.items() if value > 0}
        if known:
            data[label_of(run)] = known
    if not data:
        return None
    bars = {
        label: {_PARTS[part]: value for part, value in parts.items()}
        for label, parts in data.items()
    }
    marks = {_PARTS[part]: mark for part, mark in _PART_MARKS.items()}
    notes = {label: f"{sum(parts.values()):.4g} s" for label, parts in data.items()}
    drawn = _stacked(bars, marks, notes, dict.fromkeys(data, 0), "seconds")
    caption = "Wall time of each run, as far as it was recorded."
    return finish(drawn, "cost", "Where the time went", caption, data)


def _stacked(
    bars: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, Mark],
    notes: Mapping[str, str],
    slack: Mapping[str, float],
    x_label: str,
) -> Canvas:
    used = [key for key in marks if any(key in parts for parts in bars.values())]
    entries = [safe(key, 24) for key in used] + ["slack"] * any(slack.values())
    shape = legend_shape(entries, _WIDTH - 20, 4)
    head, tall = 12 + 20 * shape[0], 54.0 * len(bars)
    height = head + tall + 46
    drawn = canvas(_WIDTH, height)
    ax = drawn.add_axes((14 / _WIDTH, 46 / height, 1 - 34 / _WIDTH, tall / height))
    longest = max(sum(parts.values()) + slack[label] for label, parts in bars.items()) or 1
    for row, (label, parts) in enumerate(bars.items()):
        start = 0.0
        for key, value in parts.items():
            share = f"{100 * value / sum(parts.values()):.0f} %" if value / longest >= 0.1 else ""
            _segment(ax, row, start, value, marks[key], share)
            start += value
        if slack[label]:
            ax.barh(row, slack[label], 0.5, start, color="white", edgecolor="#333333", hatch="xxx")
        ax.text(0, row - 0.42, label, fontweight="bold", va="center")
        ax.text(longest, row - 0.42, notes[label], ha="right", va="center")
    ax.set_yticks([])
    ax.set_ylim(len(bars) - 0.6, -0.6)
    ax.set_xlim(0, longest)
    ax.xaxis.set_major_formatter(lambda value, _: count(value))
    whole_ticks(ax, "x", 5)
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(x_label)
    _legend(drawn, entries, [marks[key] for key in used], shape)
    return drawn


def _segment(ax: Any, row: int, start: float, value: float, mark: Mark, text: str) -> None:
    style = {"color": mark.color, "hatch": mark.hatch, "edgecolor": "white", "linewidth": 0.8}
    ax.barh(row, value, 0.5, start, **style)
    if text:
        plate = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
        place = {"ha": "center", "va": "center_baseline", "fontsize": 10.5}
        ax.text(start + value / 2, row, text, bbox=plate, **place)


def _legend(
    drawn: Canvas, labels: Sequence[str], marks: Sequence[Mark], shape: tuple[int, int]
) -> None:
    handles = [Patch(facecolor=m.color, hatch=m.hatch, edgecolor="white") for m in marks]
    if len(labels) > len(marks):
        handles.append(Patch(facecolor="white", hatch="xxx", edgecolor="#333333"))
    style = {"columnspacing": 1.4, "handlelength": 1.6, "handleheight": 1.0}
    add_legend(drawn, handles, labels, shape, left=6, **style)


def _slack_label(entry: Mapping[str, Any]) -> str:
    if entry["slack"] is None:
        return f"{count(sum(entry['segments'].values()))} (no budget known)"
    if entry["slack"] < 0:
        return f"{count(-entry['slack'])} over budget"
    return f"slack {count(entry['slack'])}"


def _slack_sentence(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.slack is not None and run.budget]
    if not known:
        return "These records name no budget, so slack is unknown."
    over = [run for run in known if (run.slack or 0) < 0]
    if over:
        stopped = [run for run in over if run.falls and not run.finished]
        odd = [run for run in over if run not in stopped]
        parts = [f"{label_of(run)} was stopped on the way down to its budget." for run in stopped]
        if odd:
            who = listed(label_of(run) for run in odd)
            why = "it was not brought down to it" if all(run.falls for run in odd) else _WHY
            parts.append(f"{who} spends more than its budget: {why}.")
        return " ".join(parts)
    worst = max(known, key=lambda run: (run.slack or 0) / (run.budget or 1))
    if not worst.slack:
        return "The budget is spent to the last parameter."
    share = percent(worst.slack / (worst.budget or 1))
    most = "" if len(known) == 1 else f" at most (in {label_of(worst)})"
    return f"What is left of the budget (slack) is {share}{most}."
