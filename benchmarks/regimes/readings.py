"""What methods read from one calibration, at every setting that it allows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.regimes.measure import Case, Pass
from benchmarks.regimes.views import mean, seen, views
from torch import Tensor

from gradrank.allocation import proportional
from gradrank.core.budget import Budget
from gradrank.core.targets import Target
from gradrank.methods.gard import Gard
from gradrank.methods.gradient_norm import GradientNorm
from gradrank.methods.method import Assessment
from gradrank.methods.waterfill import Waterfill
from gradrank.ops.spectrum import eigenvalues, entropy_rank, stable_rank
from gradrank.reliability import split_half
from gradrank.signals.measurement import Measurement

ENERGIES = (0.3, 0.5, 0.7, 0.9)
BUDGETS = ("uniform:1", "uniform:8")
NORM, WATERFILL = "gradient-norm", "waterfill"
STABLE, ENTROPY = "stable rank", "entropy rank"
# Sizes that range over decades: what is said of their variance is said of their logarithms.
MAGNITUDES = (NORM, WATERFILL)
SPLITS = 4


def gard(energy: float, centred: bool = False) -> str:
    """Return the name of GARD's effective rank at a setting.

    Args:
        energy: Threshold.
        centred: Whether the mean gradient is removed.
    """
    return f"gard {energy:g}{' centred' if centred else ''}"


@dataclass(frozen=True, slots=True)
class SpectrumReading:
    """Another number of the same spectrum, which has no ceiling to be saturated at.

    Attributes:
        measure: Takes eigenvalues ``[targets, M]`` to one number each.
    """

    measure: Callable[[Tensor], Tensor]

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return the numbers as scores.

        Args:
            targets: The targets.
            measurement: Measurement with the spectrum.
        """
        statistic = measurement.need_spectrum() if measurement else None
        grams = [statistic.gram[target.name] for target in targets] if statistic else []
        found = self.measure(eigenvalues(torch.stack(grams))).tolist()
        return Assessment(dict(zip((t.name for t in targets), found, strict=True)))


def readings(whole: bool) -> dict[str, Any]:
    """Return everything that is read from a view of a measurement, by name.

    Args:
        whole: Whether the view is the whole, which has the mean gradient too. Centring is tried
            there only.
    """
    found: dict[str, Any] = {
        gard(energy, centred): Gard(energy=energy, centring=centred)
        for centred in ((False, True) if whole else (False,))
        for energy in ENERGIES
    }
    found |= {STABLE: SpectrumReading(stable_rank), ENTROPY: SpectrumReading(entropy_rank)}
    found[NORM] = GradientNorm()
    if whole:
        found[WATERFILL] = Waterfill()
    return found


def read_pass(case: Case, seed: int, taken: Pass) -> dict[str, Any]:
    """Return what a calibration says, as plain data.

    Args:
        case: What was measured.
        seed: With which seed.
        taken: The calibration.

    Returns:
        ``case``, ``seed``, ``loss``, ``seconds`` and ``rows``: a row per view and reading with
        ``scores`` in the order of the targets, ``saturation``, ``split_half``, ``within_shape``
        and, where scores do not determine them, ``ranks`` by budget.
    """
    measurement = taken.measurement
    rows = []
    for view in views(measurement.batches):
        part = seen(measurement, view)
        for name, method in readings(part is measurement).items():
            row = _read(name, method, measurement.targets, part)
            rows.append({"batches": view.batches, "group": view.group, "reading": name, **row})
    return {
        "case": case.name,
        "seed": seed,
        "loss": round(taken.loss, 4),
        "seconds": round(float(measurement.info["seconds"]), 1),
        "tokens": measurement.info["tokens"],
        "rows": rows,
    }


def _read(
    name: str, method: Any, targets: tuple[Target, ...], measurement: Measurement
) -> dict[str, Any]:
    # The effective rank has no use for the mean gradient, which knows one split into halves only.
    if name != WATERFILL:
        measurement = Measurement(targets, measurement.spectrum, None, measurement.info)
    else:
        measurement = Measurement(targets, None, measurement.mean_gradient, measurement.info)
    assessment = method.assess(targets, measurement)
    halves = split_half(method, targets, measurement, assessment, SPLITS)
    details, scores = assessment.details, assessment.scores
    shown = {t: details.get(t, {}).get("effective_rank", score) for t, score in scores.items()}
    row: dict[str, Any] = {
        "scores": as_text([shown[target.name] for target in targets]),
        "saturation": mean([d.get("saturation") for d in details.values()]),
        "split_half": halves["split_half"],
        "within_shape": halves["within_shape"],
    }
    row |= {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
    if assessment.gains:
        row["ranks"] = {
            budget: as_text([found[target.name] for target in targets])
            for budget in BUDGETS
            for found in [method.ranks(targets, assessment, resolved(budget, targets))]
        }
    return row


def planned(row: Mapping[str, Any], targets: Sequence[Target], budget: str) -> dict[str, int]:
    """Return the ranks that a row leads to.

    Args:
        row: A row of :func:`read_pass`.
        targets: The targets.
        budget: One of ``BUDGETS``.
    """
    if "ranks" in row:
        return {
            t.name: int(r) for t, r in zip(targets, from_text(row["ranks"][budget]), strict=True)
        }
    names = (target.name for target in targets)
    scores = dict(zip(names, from_text(row["scores"]), strict=True))
    return proportional(targets, scores, resolved(budget, targets))


def resolved(budget: str, targets: Sequence[Target]) -> int:
    """Return a budget in parameters.

    Args:
        budget: As users write it, without percentages.
        targets: The targets.
    """
    return Budget.parse(budget).resolve(targets, 0)


def as_text(values: Sequence[float]) -> str:
    """Return numbers as one line, four digits each: short in a file and easy to compare.

    Args:
        values: The numbers.

    Examples:
        >>> as_text([1.0, 0.123456])
        '1 0.1235'
    """
    return " ".join(f"{value:.4g}" for value in values)


def from_text(text: str) -> list[float]:
    """Return the numbers of a line.

    Args:
        text: From :func:`as_text`.
    """
    return [float(part) for part in text.split()]
