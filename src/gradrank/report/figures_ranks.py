"""Where the capacity went: ranks over layers and module types, and how they are distributed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradrank.report.heatmap import MAX_ROWS, Scale, heat_map
from gradrank.report.layout import Layout
from gradrank.report.panels import MAX_PANELS, small_multiples
from gradrank.report.style import Mark, label_of, run_marks, whole_ticks
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, listed, number, plural
from gradrank.report.view import Run, final

MAX_ALLOCATIONS = 6


@dataclass(frozen=True)
class Allocation:
    """The ranks that one or several runs share: the final ones, and where they began.

    ``split`` holds the targets whose rows are split in two groups; their rank is r + r'.
    """

    label: str
    ranks: Mapping[str, int]
    mark: Mark
    start: Mapping[str, int] | None = None
    split: frozenset[str] = frozenset()

    @property
    def constant(self) -> int | None:
        """The rank that every target has, or None if ranks differ."""
        ranks = set(self.ranks.values())
        return ranks.pop() if len(ranks) == 1 else None


def allocations(runs: Sequence[Run]) -> list[Allocation]:
    """Return each allocation once; runs with equal ranks, in the end and at the start, share one.

    Args:
        runs: The runs.

    Returns:
        The allocations, in order of appearance, at most ``MAX_ALLOCATIONS``.
    """
    marks = run_marks(runs)
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.planned:
            key = tuple(tuple(sorted(r.items())) for r in (run.ranks, _started(run) or {}))
            key = (*key, frozenset(run.splits))
            groups.setdefault(key, []).append(run)
    found: dict[str, Allocation] = {}
    for group in list(groups.values())[:MAX_ALLOCATIONS]:
        label = label_of(group[0])
        if len(group) > 1:
            methods = listed(dict.fromkeys(run.method for run in group))
            label = f"{methods} ({plural(len(group), 'run')})"
        if label in found:
            label = f"{label} as {label_of(group[0])}"
        first = group[0]
        mark, split = marks[first.label], frozenset(first.splits)
        found[label] = Allocation(label, first.ranks, mark, _started(first), split)
    return list(found.values())


def _started(run: Run) -> Mapping[str, int] | None:
    """Return the ranks at the start of a run; None where only one allocation is known."""
    return run.history.start if run.history is not None and run.history.ranks else None


@look()
def rank_heat_map(runs: Sequence[Run], layout: Layout) -> Figure | None:
    """Draw the rank of every target, layers across and module types down.

    Args:
        runs: The runs.
        layout: Where each target stands.

    Returns:
        The figure, or None without a plan. ``data``: ``rows``, ``columns``, ``panels``; ranks that
        differed at the start of a run have a panel of their own.

    Source:
        IGU-LoRA, Figure 5: ranks by layer and module type.
    """
    every = allocations(runs)
    if not every:
        return None
    varied = [a for a in every if a.constant is None] or every[:1]
    panels: dict[str, dict[str, float]] = {}
    for a in varied:
        if a.start is not None and len({a.start.get(name, 0) for name in a.ranks}) > 1:
            panels[f"{a.label}, at the start"] = {n: float(a.start.get(n, 0)) for n in a.ranks}
        panels[a.label] = {name: float(rank) for name, rank in a.ranks.items()}
    panels = dict(list(panels.items())[:MAX_ALLOCATIONS])
    highest = max(max(ranks.values()) for ranks in panels.values())
    scale = Scale(1, max(highest, 2), "rank")
    drawn, data = heat_map(panels, layout, scale)
    caption = "Brighter is a higher rank, so more directions for that matrix to change in."
    if any(0 in a.ranks.values() for a in varied):
        caption += " Light grey cells are rank 0: those targets carry no adapter."
    caption += _split_note(varied, "Of targets with a neuron partition r + r'")
    caption += _constant_note(every, varied) + _start_note(varied) + _dropped_note(layout, MAX_ROWS)
    title = _titled("Rank of every target", runs)
    headline = " ".join(text for a in varied if (text := _depths(a, layout)))
    return finish(drawn, "rank-heat-map", title, caption, data, headline)


@look()
def rank_profile(runs: Sequence[Run], layout: Layout) -> Figure | None:
    """Draw rank over layers, one panel per module type and one line per allocation.

    Args:
        runs: The runs.
        layout: Where each target stands.

    Returns:
        The figure, or None if there is no layer to follow. ``data``: per module type and
        allocation the ``layers`` and ``ranks``.
    """
    every = allocations(runs)
    lines = _profiles(every, layout)
    if not lines or max(len(p["ranks"]) for by in lines.values() for p in by.values()) < 2:
        return None
    marks = {a.label: a.mark for a in every}
    dense = len(layout.columns) > 40
    stacks = {stack for stack, depth in layout.columns if depth is not None}
    axis = "layer" if len(stacks) == 1 else "layer, stack after stack"
    highest = max(max(p["ranks"]) for by in lines.values() for p in by.values())

    def draw(ax: Axes, title: str) -> None:
        for label, profile in lines[title].items():
            mark = marks[label]
            ax.plot(
                profile["layers"],
                profile["ranks"],
                color=mark.color,
                linestyle=mark.line,
                marker=None if dense else mark.marker,
                markersize=3.6,
                linewidth=1.4,
            )
        ax.set_ylim(0, 1.08 * max(highest, 1))
        whole_ticks(ax, "x", 6)
        whole_ticks(ax, "y", 5)

    handles = [
        Line2D([], [], color=m.color, linestyle=m.line, marker=None if dense else m.marker)
        for m in marks.values()
    ]
    drawn = small_multiples(list(lines), draw, axis, "rank", (handles, list(marks)))
    caption = " ".join(_extremes(a, layout) for a in every if a.constant is None)
    caption = caption or "Every layer of a type has the same rank."
    caption += _split_note(every, "Of targets with a neuron partition r + r'")
    caption += _dropped_note(layout, MAX_PANELS)
    return finish(drawn, "rank-profile", _titled("Rank by layer", runs), caption, lines)


@look()
def rank_histogram(runs: Sequence[Run]) -> Figure | None:
    """Draw how many targets have which rank.

    Args:
        runs: The runs.

    Returns:
        The figure, or None without a plan. ``data``: per allocation ``{rank: targets}``;
        allocations of one single rank are drawn as a line.
    """
    every = allocations(runs)
    if not every:
        return None
    varied = [a for a in every if a.constant is None]
    bars = varied or every
    data = {a.label: dict(sorted(Counter(a.ranks.values()).items())) for a in every}
    highest = max(max(ranks) for ranks in data.values())
    by_label = {a.label: a for a in bars}

    def draw(ax: Axes, label: str) -> None:
        counted, mark = data[label], by_label[label].mark
        style = {"color": mark.color, "hatch": mark.hatch, "edgecolor": "white", "linewidth": 0.5}
        ax.bar(list(counted), list(counted.values()), width=0.86, **style)
        split = by_label[label].split
        halves = Counter(rank for n, rank in by_label[label].ranks.items() if n in split)
        if halves:
            hollow = {"color": "white", "edgecolor": mark.color, "hatch": "xx", "linewidth": 1.0}
            ax.bar(list(halves), list(halves.values()), width=0.74, **hollow)
        for other in every:
            if varied and other.constant is not None:
                ax.axvline(other.constant, color="#444444", linestyle=other.mark.line)
        ax.set_xlim(-0.8, highest + 0.8)
        ax.set_ylim(0, 1.06 * most)
        ax.grid(axis="x", visible=False)
        whole_ticks(ax, "x", 10)
        whole_ticks(ax, "y", 4)

    most = max(max(data[label].values()) for label in by_label)
    drawn = small_multiples(list(by_label), draw, "rank", "targets", stacked=True)
    caption = "How many targets have which rank."
    constant = [a for a in every if varied and a.constant is not None]
    if constant:
        lines = listed(f"{a.label} (rank {a.constant} everywhere)" for a in constant)
        caption += f" The broken line marks {lines}."
    caption += _split_note(bars, "Crossed bars count targets with a neuron partition: there r + r'")
    title = f"Distribution of {'final ' if final(runs) else ''}ranks"
    return finish(drawn, "rank-histogram", title, caption, data)


def _titled(title: str, runs: Sequence[Run]) -> str:
    return f"Final {title[0].lower()}{title[1:]}" if final(runs) else title


def _profiles(every: Sequence[Allocation], layout: Layout) -> dict[str, dict[str, Any]]:
    """Return ``{type: {allocation: {"layers", "ranks"}}}``; a second stack continues the axis."""
    numbered = [i for i, (_, depth) in enumerate(layout.columns) if depth is not None]
    stacks = {layout.columns[i][0] for i in numbered}
    result: dict[str, dict[str, Any]] = {}
    for allocation in every:
        grid = layout.grid({name: float(rank) for name, rank in allocation.ranks.items()})
        for row, cells in zip(layout.rows, grid, strict=True):
            points = [
                (i if len(stacks) > 1 else layout.columns[i][1], int(value))
                for i in numbered
                if (value := cells[i]) is not None
            ]
            if points and (row in result or len(result) < MAX_PANELS):
                layers, ranks = zip(*points, strict=True)
                curves = result.setdefault(row, {})
                curves[allocation.label] = {"layers": list(layers), "ranks": list(ranks)}
    return result


def _extremes(allocation: Allocation, layout: Layout) -> str:
    by_type: dict[str, list[int]] = {}
    for name, rank in allocation.ranks.items():
        by_type.setdefault(layout.row_of(name), []).append(rank)
    means = {row: sum(ranks) / len(ranks) for row, ranks in by_type.items()}
    top, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    if top == low:
        return f"{allocation.label} has mean rank {number(means[top], 3)}."
    return (
        f"{allocation.label} gives {top} the most (mean rank {number(means[top], 3)}) and {low} "
        f"the least ({number(means[low], 3)})."
    )


def _constant_note(every: Sequence[Allocation], drawn: Sequence[Allocation]) -> str:
    left_out = [a for a in every if a not in drawn]
    notes = listed(f"{a.label} (rank {a.constant} everywhere)" for a in left_out)
    return f" Not drawn: {notes}." if left_out else ""


def _start_note(drawn: Sequence[Allocation]) -> str:
    same = {}
    for a in drawn:
        ranks = {a.start.get(name, 0) for name in a.ranks} if a.start is not None else set()
        if len(ranks) == 1:
            same[a.label] = ranks.pop()
    notes = listed(f"{label} had rank {rank}" for label, rank in same.items())
    return f" At the start every target of {notes}." if notes else ""


def _split_note(drawn: Sequence[Allocation], what: str) -> str:
    if not any(a.split for a in drawn):
        return ""
    return f" {what} is shown, the rank of the stock LoRA; no row is trained with that much."


def _depths(allocation: Allocation, layout: Layout) -> str:
    """Say how ranks differ between the first and the last third of the layers."""
    numbered = [i for i, (_, depth) in enumerate(layout.columns) if depth is not None]
    part = len(numbered) // 3
    if not part or allocation.constant is not None:
        return ""
    ends = []
    for columns in (set(numbered[:part]), set(numbered[-part:])):
        ranks = [r for name, r in allocation.ranks.items() if layout.places[name][0] in columns]
        if not ranks:
            return ""
        ends.append(number(sum(ranks) / len(ranks), 3))
    zeros = sum(1 for rank in allocation.ranks.values() if not rank)
    whole = plural(len(allocation.ranks), "target")
    lost = f"; {count(zeros)} of {whole} have no adapter" if zeros else ""
    return (
        f"{allocation.label}: mean rank {ends[0]} in the first third of the layers, {ends[1]} in "
        f"the last{lost}."
    )


def _dropped_note(layout: Layout, most: int) -> str:
    dropped = len(layout.rows) - most
    if dropped <= 0:
        return ""
    return f" The first {count(most)} module types are drawn; all are in the table of targets."
