r"""What a calibration tells about targets, and how much of it is more than chance or module type.

Everything here is arithmetic on one measurement with many small mini-batches. The Gram matrix of
:math:`M` gradients holds those of fewer batches (its corner) and of larger ones (averages of its
rows and columns), so that no setting needs a pass of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from gradrank.core.errors import OptionError
from gradrank.core.targets import Target
from gradrank.ops.agreement import spearman
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic


@dataclass(frozen=True, slots=True)
class View:
    """A part of a measurement that stands for a smaller one.

    Attributes:
        batches: Mini-batches M.
        group: Measured batches that each of them joins, so that it has so many times the examples.
    """

    batches: int
    group: int = 1


def views(measured: int) -> tuple[View, ...]:
    """Return the views that a measurement allows: fewer batches, larger ones, and both.

    Args:
        measured: Batches of the measurement.

    Returns:
        All of them first; then halves, quarters and eighths (4 batches at least), and joined
        batches at equal number (a quarter) and at equal examples.
    """
    fewer = [View(measured // part) for part in (1, 2, 4, 8)]
    quarter = measured // 4
    joined = [View(quarter, 2), View(quarter, 4), View(measured // 2, 2)]
    return tuple(view for view in (*fewer, *joined) if view.batches >= 4)


def joined(gram: Tensor, view: View) -> Tensor:
    """Return the Gram matrix of the first batches, joined in groups.

    Args:
        gram: ``[M, M]``, ``S Sᵀ`` with ``S = M^{-1/2} [g_1 .. g_M]``.
        view: How many, of how many batches each.

    Returns:
        ``[view.batches, view.batches]``: that of the gradients averaged over each group, which is
        the gradient of the larger batch if all batches count equally many items.

    Raises:
        OptionError: If the view needs more batches than there are.
    """
    many, used = len(gram), view.batches * view.group
    if used > many:
        raise OptionError(
            f"{view.batches} batches of {view.group} need {used} measured ones; there are {many}."
        )
    corner = gram[:used, :used] * (many / used)
    parts = corner.reshape(view.batches, view.group, view.batches, view.group)
    return parts.mean(dim=(1, 3)) * view.group


def seen(measurement: Measurement, view: View) -> Measurement:
    """Return the measurement of a view; without the mean gradient, unless it is the whole.

    Args:
        measurement: The whole measurement.
        view: The part.
    """
    if view == View(measurement.batches):
        return measurement
    gram = {name: joined(g, view) for name, g in measurement.need_spectrum().gram.items()}
    return replace(measurement, spectrum=SpectrumStatistic(gram), mean_gradient=None)


def variation(values: Sequence[float]) -> float:
    """Return the coefficient of variation, standard deviation over mean.

    Args:
        values: Numbers of 0 or more, not all zero.

    Examples:
        >>> variation([1.0, 3.0])
        0.5
    """
    found = np.asarray(values, dtype=float)
    return float(found.std() / found.mean())


def kind_of(target: Target) -> str:
    """Return a target's name without the index of its block: its type.

    Args:
        target: The target. The last part of its name alone would not do: three modules of a block
            of BERT end in ``dense``.

    Examples:
        >>> kind_of(Target("encoder.layer.3.output.dense", 4, 4))
        'encoder.layer.*.output.dense'
    """
    parts = target.name.split(".")
    if target.depth is not None:
        parts[parts.index(str(target.depth))] = "*"
    return ".".join(parts)


@dataclass(frozen=True)
class Fit:
    """A fit of scores by module type and depth.

    Attributes:
        explained: R², share of the variance that it explains; None for constant scores.
        adjusted: The same, less what as many parameters explain of noise; None where there are as
            many parameters as scores.
        residuals: What is left of each score.
    """

    explained: float | None
    adjusted: float | None
    residuals: np.ndarray


def explain(targets: Sequence[Target], values: Sequence[float]) -> Fit:
    """Fit scores by a constant for each type of module and one slope over the depth.

    Args:
        targets: The targets.
        values: Their scores.

    Returns:
        The fit, by least squares. What it explains needs no gradients of this task: a table of
        module types and a slope would do.
    """
    y = np.asarray(values, dtype=float)
    kinds = [kind_of(target) for target in targets]
    columns = [[float(kind == known) for kind in kinds] for known in dict.fromkeys(kinds)]
    depths = [math.nan if t.depth is None else float(t.depth) for t in targets]
    known = [depth for depth in depths if not math.isnan(depth)]
    middle = sum(known) / len(known) if known else 0.0
    # A target outside of all blocks has a type of its own and no part in the slope.
    columns.append([0.0 if math.isnan(depth) else depth - middle for depth in depths])
    design = np.array(columns).T
    solved, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    residuals = y - design @ solved
    total = float(((y - y.mean()) ** 2).sum())
    if total <= 1e-20 * float((y**2).sum()):
        return Fit(None, None, np.zeros_like(y))
    left = float((residuals**2).sum()) / total
    free = len(y) - int(rank)
    return Fit(1 - left, 1 - left * (len(y) - 1) / free if free else None, residuals)


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Pearson's correlation, or None if a side does not vary.

    Args:
        first: ``[n]``.
        second: ``[n]``.
    """
    a, b = first - first.mean(), second - second.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 1e-300 else None


def within_shapes(
    targets: Sequence[Target], first: Sequence[float], second: Sequence[float]
) -> float | None:
    """Return Spearman's correlation within targets of one shape, weighted by their number.

    Args:
        targets: The targets.
        first: A score of each.
        second: Another one.

    Returns:
        The mean over shapes with three targets or more; None if none of them has one.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, target in enumerate(targets):
        groups.setdefault((target.d_in, target.d_out), []).append(index)
    a, b = (torch.tensor(list(side), dtype=torch.float64) for side in (first, second))
    pairs = [(len(g), spearman(a[g], b[g])) for g in groups.values() if len(g) > 2]
    known = [(size, value) for size, value in pairs if math.isfinite(value)]
    total = sum(size for size, _ in known)
    return sum(size * value for size, value in known) / total if total else None


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known, or None if nothing is.

    Args:
        values: Numbers; None and NaN do not count.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def crossed(seeds: Mapping[int, object], others: Mapping[int, object]) -> list[tuple[int, int]]:
    """Return pairs of seeds of two tasks that differ, as pairs within a task do.

    Args:
        seeds: What one task has, by seed.
        others: What the other has.

    Returns:
        Ordered pairs. Equal seeds would share the sketch and the new head, and so agree too well.
    """
    return [(a, b) for a, b in product(seeds, others) if a != b]
