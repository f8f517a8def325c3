"""What a measurement read from a file must satisfy before anything is computed from it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradrank.core.targets import Target
from gradrank.signals.mean_gradient import EVEN, ODD, WHOLE, MeanGradientStatistic
from gradrank.signals.spectrum import SpectrumStatistic

MAX_BATCHES = 65_536
# Row factors are kept in float32; the singular values in float64.
_SAME_ENERGY = 1e-4


def check_parts(
    targets: Sequence[Target],
    spectrum: SpectrumStatistic | None,
    mean_gradient: MeanGradientStatistic | None,
    info: Mapping[str, Any],
) -> None:
    """Refuse statistics that do not fit their targets or one another.

    Args:
        targets: The targets.
        spectrum: Gram matrices, if measured.
        mean_gradient: Singular values and row factors, if measured.
        info: Provenance.

    Raises:
        ValueError: Naming the first fault.
    """
    names = [target.name for target in targets]
    if not names or len(set(names)) != len(names):
        raise ValueError("it names no target, or one twice")
    if any(target.d_in < 1 or target.d_out < 1 for target in targets):
        raise ValueError("a target has an impossible shape")
    if spectrum is None and mean_gradient is None:
        raise ValueError("it holds no statistic")
    _check_info(info)
    counts = {part.batches for part in (spectrum, mean_gradient) if part is not None}
    if len(counts) > 1 or not 0 < min(counts) <= MAX_BATCHES:
        raise ValueError(f"it claims {' and '.join(map(str, sorted(counts)))} batches")
    if spectrum is not None:
        _check_spectrum(spectrum, names, min(counts))
    if mean_gradient is not None:
        _check_mean_gradient(mean_gradient, targets)


def _check_info(info: Mapping[str, Any]) -> None:
    size = info.get("base_parameters")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise ValueError(f"base_parameters is {size!r}, which is no whole number")


def _check_spectrum(spectrum: SpectrumStatistic, names: Sequence[str], batches: int) -> None:
    _check_names(spectrum.gram, names, "Gram matrices")
    for name, gram in spectrum.gram.items():
        _check_tensor(gram, (batches, batches), f"Gram matrix of '{name}'")
    if spectrum.rows:
        _check_names(spectrum.rows, names, "sketches")
    for name, rows in spectrum.rows.items():
        _check_tensor(rows, (batches, rows.shape[-1]), f"sketch of '{name}'")


def _check_mean_gradient(statistic: MeanGradientStatistic, targets: Sequence[Target]) -> None:
    counts = statistic.counts
    whole = counts[WHOLE] == counts[EVEN] + counts[ODD] and min(counts.values()) >= 0
    if not whole or set(counts) != {WHOLE, EVEN, ODD}:
        raise ValueError(f"its numbers of batches {counts} do not add up")
    for part in (WHOLE, EVEN, ODD):
        named = statistic.values[part]
        _check_names(named, [target.name for target in targets], "singular values")
        for target in targets:
            values, what = named[target.name], f"singular values of '{target.name}'"
            _check_tensor(values, values.shape[:1], what)
            if not 0 < values.numel() <= target.max_rank or bool((values < 0).any()):
                raise ValueError(f"the {what} are negative, or too many for its shape")
            if statistic.rows:
                _check_rows(statistic, part, target, values)
        if statistic.rows:
            _check_names(statistic.rows[part], [target.name for target in targets], "row factors")


def _check_rows(
    statistic: MeanGradientStatistic, part: str, target: Target, values: Tensor
) -> None:
    factors = statistic.rows[part].get(target.name)
    if factors is None:
        raise ValueError(f"'{target.name}' has no row factors")
    what = f"row factors of '{target.name}'"
    _check_tensor(factors, (target.d_out, values.numel()), what)
    energy, expected = float(factors.double().square().sum()), float(values.square().sum())
    if not math.isclose(energy, expected, rel_tol=_SAME_ENERGY):
        raise ValueError(
            f"the {what} hold the energy {energy:g}, and its singular values {expected:g}"
        )


def _check_names(named: Mapping[str, Tensor], names: Sequence[str], what: str) -> None:
    if set(named) != set(names):
        odd = sorted(set(named) ^ set(names))[0]
        raise ValueError(f"its {what} do not belong to its targets: '{odd}'")


def _check_tensor(tensor: Tensor, shape: Sequence[int], what: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"the {what} has the shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the {what} holds values that are no finite numbers")
