"""What was measured, over the model: gradient energy and effective rank by layer and type."""

import math

from gradrank.report.figures_spectra import saturation, saturation_sentence
from gradrank.report.heatmap import Scale, heat_map
from gradrank.report.layout import Layout
from gradrank.report.svg import Figure, finish, look
from gradrank.report.text import count, number
from gradrank.report.view import Measurement


@look()
def energy_heat_map(measured: Measurement, layout: Layout, suffix: str = "") -> Figure | None:
    """Draw log10 of the gradient energy (trace of the Gram matrix) of every target.

    Args:
        measured: The measurement.
        layout: Where each target stands.
        suffix: Ends the figure's name when a page shows several measurements.

    Returns:
        The figure, or None if no energy is known. ``data``: ``rows``, ``columns``, ``panels``
        with log10 values; targets without any gradient are left empty.
    """
    energies = {name: _energy(m.energy, m.eigenvalues) for name, m in measured.targets.items()}
    known = {name: math.log10(value) for name, value in energies.items() if value}
    if not known:
        return None
    low, high = min(known.values()), max(known.values())
    scale = Scale(low, high, "gradient energy", "cividis", log=True, numbers=False)
    drawn, data = heat_map({"energy": known}, layout, scale, titled=False)
    caption = "Mean squared gradient norm of every target (trace of the Gram matrix, logarithmic)."
    if high > low:
        times = _times(10 ** (high - low))
        caption += f" The strongest target has {times} times the energy of the weakest."
    silent = sum(1 for value in energies.values() if value == 0)
    if silent:
        caption += f" Empty: {silent} without any gradient."
    return finish(drawn, f"energy-heat-map{suffix}", "Gradient energy", caption, data)


@look()
def effective_rank_heat_map(
    measured: Measurement, layout: Layout, suffix: str = ""
) -> Figure | None:
    """Draw the effective rank of every target, on a scale that ends at what M batches allow.

    Args:
        measured: The measurement.
        layout: Where each target stands.
        suffix: Ends the figure's name when a page shows several measurements.

    Returns:
        The figure, or None without effective ranks. ``data``: ``rows``, ``columns``, ``panels``,
        ``saturation``.
    """
    ranks = {
        name: float(m.effective_rank)
        for name, m in measured.targets.items()
        if m.effective_rank is not None
    }
    if not ranks:
        return None
    found = saturation(measured)
    ceiling = found["ceiling"] if found else measured.batches or max(ranks.values())
    scale = Scale(1, max(ceiling, *ranks.values(), 2), "effective rank")
    drawn, data = heat_map({"effective rank": ranks}, layout, scale, titled=False)
    caption = (
        "Directions over mini-batches that hold the share α of a target's gradient energy. "
        + saturation_sentence(measured)
    )
    return finish(
        drawn,
        f"effective-rank-heat-map{suffix}",
        "Effective rank",
        caption,
        {**data, "saturation": found},
    )


def _energy(told: float | None, eigenvalues: tuple[float, ...]) -> float | None:
    if told is not None:
        return max(told, 0.0)
    return math.fsum(eigenvalues) if eigenvalues else None


def _times(ratio: float) -> str:
    return number(ratio, 2) if ratio < 100 or ratio >= 1e6 else count(round(ratio, -1))
