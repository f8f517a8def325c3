"""How often neurons were found important: a histogram of hits per module type."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradrank.report.layout import Layout
from gradrank.report.panels import MAX_PANELS, small_multiples
from gradrank.report.style import label_of, percent_ticks
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, percent
from gradrank.report.view import Run

MAX_BARS = 41
# Between these shares of the looks a neuron counts as undecided.
MIDDLE = (0.25, 0.75)
_BAR, _CHANCE = "#56B4E9", "#222222"


@look()
def hit_histogram(run: Run, layout: Layout, suffix: str = "", named: bool = False) -> Figure | None:
    """Draw, per module type, which share of neurons was important in which share of the looks.

    Args:
        run: The run.
        layout: Gives the module types.
        suffix: Ends the figure's name when a page shows several runs.
        named: Whether the title names the run.

    Returns:
        The figure, or None without hits. ``data``: per module type ``frequency`` (share of the
        looks), ``share`` (of the neurons), ``chance`` (the same if each look were drawn at random
        with the target's own mean), ``middle`` and ``middle_chance`` (shares of neurons between a
        quarter and three quarters of the looks).

    Source:
        PiLoRA, section 3.3: hit counts and the majority threshold.
    """
    hits = run.neurons.hits if run.neurons else {}
    groups: dict[str, list[Sequence[int]]] = {}
    for name, counts in hits.items():
        if name in layout.places:
            groups.setdefault(layout.row_of(name), []).append(counts)
    if not groups:
        return None
    every = {row: _summed(groups[row]) for row in layout.rows if row in groups}
    shown = dict(list(every.items())[:MAX_PANELS])
    top = max(max(*entry["share"], *entry["chance"]) for entry in shown.values())
    majority = run.neurons is not None and run.neurons.rule == "majority"

    def draw(ax: Axes, title: str) -> None:
        entry = shown[title]
        wide = 1 / max(1, len(entry["share"]) - 1)
        bars = {"width": 0.9 * wide, "color": _BAR, "edgecolor": "#2b6f96", "linewidth": 0.4}
        ax.bar(entry["frequency"], entry["share"], **bars)
        ax.plot(entry["frequency"], entry["chance"], color=_CHANCE, linewidth=1.3)
        if majority:
            ax.axvline(entry["majority"], color="#D55E00", linestyle=(0, (4, 2)), linewidth=1.6)
        ax.set_xlim(-0.75 * wide, 1 + 0.75 * wide)
        ax.set_ylim(0, 1.08 * top)
        ax.grid(axis="x", visible=False)
        percent_ticks(ax.xaxis)
        percent_ticks(ax.yaxis)

    handles: list[Any] = [Patch(facecolor=_BAR), Line2D([], [], color=_CHANCE, linewidth=1.3)]
    texts = ["neurons", "if looks were drawn at random"]
    if majority:
        handles.append(Line2D([], [], color="#D55E00", linestyle=(0, (4, 2)), linewidth=1.6))
        texts.append("majority: dominant to the right")
    axis = "share of looks in which a neuron was important"
    short = axis if len(shown) == 1 else "share of looks with a hit"
    drawn = small_multiples(list(shown), draw, short, "share of neurons", (handles, texts))
    caption = _caption(run, len(every) - len(shown))
    title = "How often neurons were important" + (f": {label_of(run)}" if named else "")
    name = f"hit-frequency{suffix}"
    return finish(drawn, name, title, caption, shown, _headline(run, hits.values()))


def middle(hits: Sequence[int]) -> int:
    """Count the neurons that are undecided: hits in more than 25 and less than 75 % of the looks.

    Args:
        hits: How many neurons were important in k looks, for k from 0 to all of them.

    Returns:
        The count.

    Examples:
        >>> middle([3, 1, 5, 1, 2])
        5
    """
    looks = len(hits) - 1
    return sum(n for k, n in enumerate(hits) if MIDDLE[0] * looks < k < MIDDLE[1] * looks)


def by_chance(hits: Sequence[int]) -> np.ndarray:
    """Return the histogram of neurons that are all alike: looks drawn with their common mean.

    Args:
        hits: How many neurons were important in k looks, for k from 0 to all of them.

    Returns:
        Expected neurons ``[looks + 1]``, of a binomial law.
    """
    looks, whole = len(hits) - 1, sum(hits)
    mean = sum(k * n for k, n in enumerate(hits)) / (looks * whole) if looks and whole else 0.0
    if not 0 < mean < 1:
        return np.array(hits, dtype=float)
    k = np.arange(looks + 1)
    factorials = np.array([math.lgamma(i + 1) for i in range(looks + 1)])
    ways = factorials[-1] - factorials - factorials[::-1]
    return whole * np.exp(ways + k * math.log(mean) + (looks - k) * math.log1p(-mean))


def _summed(histograms: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Add histograms up over a common axis; targets may differ in their looks."""
    bars = min(MAX_BARS, max(len(h) for h in histograms))
    exact = {len(h) for h in histograms} == {bars}
    told, chance = np.zeros(bars), np.zeros(bars)
    for h in histograms:
        places = np.rint(np.arange(len(h)) * (bars - 1) / (len(h) - 1)).astype(int)
        np.add.at(told, places, np.array(h, dtype=float))
        np.add.at(chance, places, by_chance(h))
    whole = told.sum() or 1.0
    return {
        "frequency": (np.arange(bars) / (bars - 1)).tolist(),
        "share": (told / whole).tolist(),
        "chance": (chance / whole).tolist(),
        # Half of the looks is no majority: where its bar is drawn, the line stands right of it.
        "majority": ((bars - 1) // 2 + 0.5) / (bars - 1) if exact else 0.5,
        "middle": sum(middle(h) for h in histograms) / whole,
        "middle_chance": sum(_middle_of(by_chance(h)) for h in histograms) / whole,
    }


def _middle_of(expected: np.ndarray) -> float:
    looks = len(expected) - 1
    k = np.arange(looks + 1)
    return float(expected[(MIDDLE[0] * looks < k) & (k < MIDDLE[1] * looks)].sum())


def _caption(run: Run, hidden: int) -> str:
    caption = (
        "A hit: the neuron's row of the gradient is above the mean of all rows in a look. Two "
        "peaks far apart mean that looks agree on which neurons matter; bars that follow the line "
        "mean that the looks tell neurons apart no better than chance would."
    )
    rule = run.neurons.rule if run.neurons else ""
    if rule and rule != "majority":
        caption += (
            f" Neurons were chosen by the rule '{rule}', which has no threshold on this axis."
        )
    if hidden > 0:
        caption += f" The first {count(MAX_PANELS)} module types are drawn."
    return caption


def _headline(run: Run, hits: Any) -> str:
    histograms: list[Sequence[int]] = list(hits)
    whole = sum(sum(h) for h in histograms) or 1
    undecided = sum(middle(h) for h in histograms) / whole
    chance = sum(_middle_of(by_chance(h)) for h in histograms) / whole
    return (
        f"{label_of(run)}: {percent(undecided)} of the neurons are undecided (hits in 25 to 75 % "
        f"of the looks); if looks were drawn at random it would be {percent(chance)}."
    )
