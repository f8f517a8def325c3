"""Maps over time: the rank and the gradient energy of every target, step by step."""

import math
from collections.abc import Sequence
from itertools import pairwise

from gradrank.report.heatmap import Scale
from gradrank.report.history import Decision, History
from gradrank.report.layout import Layout
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, number, percent, plural
from gradrank.report.timemap import MAX_TARGETS, evenly, lanes, most_columns, time_map
from gradrank.report.view import Run


def shown_end(run: Run) -> int:
    """Return where a time axis ends: a long rest without any decision is cut short.

    Args:
        run: A run with a history.

    Returns:
        The last step to draw: the end of the run, but at most twice the last event's step.
    """
    events = run.history.events if run.history else ()
    last = events[-1].step if events else 0
    return max(1, min(run.end, 2 * last) if last else run.end)


@look()
def rank_map(run: Run, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw the rank of every target over steps.

    Args:
        run: The run.
        layout: Where each target stands.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None without ranks. ``data``: ``targets``, ``edges`` (steps), ``cells``.
    """
    history = run.history
    if history is None or not history.targets:
        return None
    rows = lanes(history.targets, layout)
    kept = [history.ranks[i] for i in evenly(len(history.ranks), most_columns(len(rows)))]
    # Ranks that changed at the very end are still seen: a fiftieth of the run is added.
    end = max(shown_end(run), kept[-1][0] + max(1, kept[-1][0] // 50))
    edges = [*(float(step) for step, _ in kept), float(end)]
    values = {row.name: [float(ranks.get(row.name, 0)) for _, ranks in kept] for row in rows}
    highest = max((max(cells) for cells in values.values()), default=0)
    drawn, data = time_map(rows, edges, values, Scale(1, max(highest, 2), "rank"), (0, end))
    caption = _reading("brighter is a higher rank, light grey is rank 0: no adapter there")
    caption += _thinned(len(kept), len(history.ranks), "recorded allocations")
    caption += _left_out(len(history.targets))
    title = "Rank of every target over time"
    return finish(drawn, f"ranks-over-time{suffix}", title, caption, data, _rank_headline(history))


@look()
def energy_map(run: Run, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw log10 of the gradient energy of every target, measuring window by window.

    Args:
        run: The run.
        layout: Where each target stands.
        suffix: Ends the figure's name when a page shows several histories.

    Returns:
        The figure, or None if no energy is known. ``data``: ``targets``, ``edges`` (steps, halfway
        between decisions), ``cells`` (log10; None where there was no gradient).
    """
    history = run.history
    # A window in which nothing had a gradient is a gap in the map, not a window less.
    known = [d for d in history.decisions if d.energy] if history else []
    if not known:
        return None
    rows = lanes(list(dict.fromkeys(name for d in known for name in d.energy)), layout)
    kept = [known[i] for i in evenly(len(known), most_columns(len(rows)))]
    values = {row.name: [_log(d.energy.get(row.name)) for d in kept] for row in rows}
    found = [v for cells in values.values() for v in cells if v is not None]
    if not found:
        return None
    scale = Scale(min(found), max(found), "gradient energy", "cividis", log=True, numbers=False)
    drawn, data = time_map(
        rows, _halfway([d.step for d in kept]), values, scale, (0, shown_end(run))
    )
    caption = _reading(
        "brighter is more energy, the mean squared gradient norm of a measuring window "
        "(logarithmic; empty: no gradient)"
    )
    caption += _thinned(len(kept), len(known), "windows") + _left_out(
        len({name for d in known for name in d.energy})
    )
    title = "Gradient energy over time"
    return finish(drawn, f"energy-over-time{suffix}", title, caption, data, _energy_headline(known))


def _rank_headline(history: History) -> str:
    net = history.change(history.start, history.final)
    ever = {
        name
        for (_, before), (_, after) in pairwise(history.ranks)
        for name in history.change(before, after)
    }
    if not ever:
        return "No rank changed."
    whole = plural(len(history.targets), "target")
    text = f"{count(len(net))} of {whole} ended with another rank than they started with"
    dropped = sum(1 for name in net if not history.final.get(name, 0))
    text += f", {count(dropped)} of them dropped" if dropped else ""
    if len(ever) > len(net):
        text += f"; {count(len(ever) - len(net))} more changed and came back"
    return f"{text}."


def _energy_headline(known: Sequence[Decision]) -> str:
    start, end = known[0], known[-1]
    last = [value for value in end.energy.values() if value > 0]
    spread = ""
    if len(last) > 1:
        ratio = max(last) / min(last)
        text = number(ratio, 2) if ratio < 100 or ratio >= 1e6 else count(round(ratio, -1))
        spread = (
            f"At step {count(end.step)} the strongest target has {text} times the energy of the "
            "weakest."
        )
    both = sorted(start.energy.keys() & end.energy.keys())
    before, after = (math.fsum(max(d.energy[n], 0.0) for n in both) for d in (start, end))
    if len(known) < 2 or not before or not after:
        return spread
    return f"{_course(after / before, start.step)} {spread}".rstrip()


def _course(ratio: float, step: int) -> str:
    """Say how the energy of all targets together changed."""
    since = f"from step {count(step)} on"
    if abs(ratio - 1) < 0.005:
        return f"Over all targets energy stayed the same {since}."
    if ratio >= 10:
        return f"Over all targets energy rose {count(ratio)} times {since}."
    verb = "rose" if ratio > 1 else "fell"
    return f"Over all targets energy {verb} by {percent(abs(ratio - 1))} {since}."


def _log(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 else None


def _halfway(steps: Sequence[int]) -> list[float]:
    """Return column edges halfway between steps, so that each column is about its decision."""
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    first = inner[0] - steps[0] if inner else max(1.0, steps[0] / 2)
    last = steps[-1] - inner[-1] if inner else max(1.0, steps[0] / 2)
    return [steps[0] - first, *inner, steps[-1] + last]


def _reading(what: str) -> str:
    return f"One row per target, grouped by module type, first layer on top; {what}."


def _thinned(kept: int, every: int, what: str) -> str:
    return (
        f" {count(kept)} of {count(every)} {what} are drawn, evenly chosen." if kept < every else ""
    )


def _left_out(targets: int) -> str:
    return f" The first {count(MAX_TARGETS)} targets are drawn." if targets > MAX_TARGETS else ""
