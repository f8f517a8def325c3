"""What was measured: spectra over mini-batches (GARD) and over matrix directions (water-filling).

The two are never mixed up: the first has one eigenvalue per mini-batch, the second one singular
value per direction of the mean gradient matrix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradrank.report.layout import Layout
from gradrank.report.panels import MAX_PANELS, small_multiples
from gradrank.report.style import Mark, log_ticks, percent_ticks, type_key, type_marks, whole_ticks
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, number, percent
from gradrank.report.view import Measurement

# More curves than this in one panel are a smear and a heavy file: a band says the same.
MAX_CURVES = 40


def cumulative(values: Sequence[float]) -> list[float]:
    """Return the running share of a spectrum's sum.

    Args:
        values: Non-negative values, ``[M]``.

    Returns:
        Shares in [0, 1], ``[M]``; empty if the sum is 0.

    Examples:
        >>> cumulative([6.0, 3.0, 1.0])
        [0.6, 0.9, 1.0]
    """
    sums = np.cumsum(np.asarray(values, dtype=float))
    return [float(share) for share in sums / sums[-1]] if sums.size and sums[-1] > 0 else []


def relative_energy(values: Sequence[float]) -> list[float]:
    """Return log10 of each direction's energy relative to the strongest.

    Args:
        values: Singular values, ``[k]``.

    Returns:
        ``log10(σ_i² / σ_1²)``, ``[k]``, cut before the first zero; empty if all are 0.

    Examples:
        >>> relative_energy([10.0, 1.0, 0.0])
        [0.0, -2.0]
    """
    ordered = sorted(values, reverse=True)
    if not ordered or ordered[0] <= 0:
        return []
    ratios = [value / ordered[0] for value in ordered]
    return [2 * math.log10(ratio) + 0.0 for ratio in ratios if ratio > 1e-8]


@look()
def eigenvalue_spectra(measured: Measurement, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw the normalised cumulative energy of every target, one panel per module type.

    Args:
        measured: The measurement.
        layout: Gives the module types.
        suffix: Ends the figure's name when a page shows several measurements.

    Returns:
        The figure, or None without eigenvalues. ``data``: ``alpha``, per module type and target
        the cumulative shares (``targets``), and the ``median`` curve per type.
    """
    curves = {name: cumulative(m.eigenvalues) for name, m in measured.targets.items()}
    drawn = _curves(
        curves,
        layout,
        labels=("eigenvalues counted", "share of energy"),
        finish_panel=lambda ax, longest: _shares(ax, longest, measured.alpha),
    )
    if drawn is None:
        return None
    canvas, data = drawn
    first = np.median([curve[0] for curve in curves.values() if curve])
    caption = (
        "Each curve is one target: how much of the gradients' energy its first k directions over "
        "mini-batches hold. A curve that rises steeply needs few directions; the straight dotted "
        "diagonal is a flat spectrum, where every batch pulls its own way. In the median target "
        f"the first direction holds {percent(float(first))}."
    )
    if measured.alpha is not None:
        caption += (
            f" The effective rank is where a curve crosses the broken line α = {measured.alpha:g}."
        )
    named = {"alpha": measured.alpha, **data}
    title = "Energy of the gradient spectra"
    return finish(canvas, f"eigenvalue-spectra{suffix}", title, caption, named)


@look()
def singular_values(measured: Measurement, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw the singular values of each target's mean gradient, one panel per module type.

    Args:
        measured: The measurement.
        layout: Gives the module types.
        suffix: Ends the figure's name when a page shows several measurements.

    Returns:
        The figure, or None without singular values. ``data``: per module type and target
        log10 of the relative energies, and the ``median`` curve per type.
    """
    curves = {name: relative_energy(m.singular_values) for name, m in measured.targets.items()}
    drawn = _curves(
        curves,
        layout,
        labels=("direction of the matrix", "energy / strongest"),
        finish_panel=lambda ax, _: log_ticks(ax.yaxis),
    )
    if drawn is None:
        return None
    canvas, data = drawn
    caption = (
        "Squared singular values of each target's mean gradient matrix, relative to its strongest "
        "direction (logarithmic). This is what a rank-k update can follow: where a curve falls "
        "fast, further ranks buy little. It is another spectrum than the one over mini-batches."
    )
    title = "Directions of the mean gradient"
    return finish(canvas, f"singular-values{suffix}", title, caption, data)


def _curves(
    curves: Mapping[str, Sequence[float]],
    layout: Layout,
    labels: tuple[str, str],
    finish_panel: Callable[[Axes, int], None],
) -> tuple[Any, dict[str, Any]] | None:
    marks = type_marks(layout.rows)
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for name, curve in curves.items():
        if curve:
            groups.setdefault(type_key(layout.row_of(name), marks), {})[name] = curve
    groups = dict(list(groups.items())[:MAX_PANELS])
    if not groups:
        return None
    longest = max(len(curve) for group in groups.values() for curve in group.values())
    medians = {key: _quantile(list(group.values()), 0.5) for key, group in groups.items()}

    def draw(ax: Axes, key: str) -> None:
        _panel(ax, list(groups[key].values()), medians[key], marks[key])
        finish_panel(ax, longest)
        whole_ticks(ax, "x", 6)

    grey = Line2D([], [], color="#777777", linewidth=0.9)
    strong = Line2D([], [], color="#333333", marker="o", markersize=4)
    many = any(len(group) > MAX_CURVES for group in groups.values())
    legend = ([strong, grey], ["median of the type", "5–95 % of targets" if many else "one target"])
    canvas = small_multiples(list(groups), draw, *labels, legend)
    return canvas, {"targets": groups, "median": medians}


def _panel(
    ax: Axes, curves: Sequence[Sequence[float]], median: Sequence[float], mark: Mark
) -> None:
    if len(curves) > MAX_CURVES:
        low, high = _quantile(curves, 0.05), _quantile(curves, 0.95)
        ax.fill_between(range(1, len(low) + 1), low, high, color=mark.color, alpha=0.25, lw=0)
    elif len(curves) > 1:
        for curve in curves:
            steps = range(1, len(curve) + 1)
            ax.plot(steps, curve, color=mark.color, linewidth=0.8, alpha=0.4)
    every = max(1, len(median) // 12)
    ax.plot(
        range(1, len(median) + 1),
        median,
        color=mark.color,
        marker=mark.marker,
        markersize=4.5,
        markevery=every,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


def _quantile(curves: Sequence[Sequence[float]], q: float) -> list[float]:
    shortest = min(len(curve) for curve in curves)
    stacked = np.array([curve[:shortest] for curve in curves], dtype=float)
    return [float(value) for value in np.quantile(stacked, q, axis=0)]


def _shares(ax: Axes, longest: int, alpha: float | None) -> None:
    ax.set_ylim(0, 1.03)
    percent_ticks(ax.yaxis)
    ax.plot([0, longest], [0, 1], color="#999999", linestyle=":", linewidth=1.2, zorder=1)
    if alpha is not None:
        ax.axhline(alpha, color="#333333", linestyle=(0, (5, 3)), linewidth=1.1)


def saturation(measured: Measurement) -> dict[str, Any] | None:
    """Compare the effective ranks with the largest value that M mini-batches allow.

    Args:
        measured: The measurement.

    Returns:
        ``batches`` M, ``alpha``, ``ceiling`` (``⌈αM⌉``, what a flat spectrum gives), ``mean`` and
        ``median`` effective rank, ``share`` (mean / ceiling), ``at_ceiling`` and ``targets``
        (counts); None if anything needed is unknown.

    Source:
        GARD, definition of the effective rank: with ``λ`` descending, the smallest k whose first
        k eigenvalues hold a share α is largest for a flat spectrum, where it is ``⌈αM⌉``.
    """
    ranks = [m.effective_rank for m in measured.targets.values() if m.effective_rank is not None]
    batches, alpha = measured.batches, measured.alpha
    if not ranks or not batches or alpha is None:
        return None
    # 0.9 * 10 must count as 9 whatever the last bit of the product says.
    ceiling = max(1, math.ceil(alpha * batches - 1e-9))
    mean = sum(ranks) / len(ranks)
    return {
        "batches": batches,
        "alpha": alpha,
        "ceiling": ceiling,
        "mean": mean,
        "median": float(np.median(ranks)),
        "share": mean / ceiling,
        "at_ceiling": sum(rank >= ceiling for rank in ranks),
        "targets": len(ranks),
    }


def saturation_sentence(measured: Measurement) -> str:
    """Say in words how close the effective ranks are to their ceiling.

    Args:
        measured: The measurement.

    Returns:
        One or two sentences.
    """
    found = saturation(measured)
    if found is None:
        return "How close they are to saturation is unknown: the record names no energy threshold."
    text = (
        f"With M = {found['batches']} mini-batches and α = {found['alpha']:g} no target can exceed "
        f"{found['ceiling']}; the mean is {number(found['mean'], 3)} "
        f"({percent(found['share'])} of that ceiling) and {count(found['at_ceiling'])} of "
        f"{count(found['targets'])} targets are at it."
    )
    if found["share"] >= 0.8:
        text += (
            " That is close to saturation: the measurement can hardly tell targets apart, so "
            "ranks come out nearly uniform. More or larger mini-batches or a smaller α help."
        )
    return text
