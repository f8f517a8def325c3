"""GARD, static: ranks in proportion to the effective rank of the gradients' spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import proportional
from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.methods.method import (
    Assessment,
    by_effective_rank,
    check_rank_bounds,
    check_sketch,
    option,
    require,
)
from gradrank.signals.measure import ESTIMATORS, Signal, Spectrum
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Gard:
    r"""Gradient-spectral rank allocation.

    Effective rank :math:`\hat r_\ell` of the Gram matrix of M mini-batch gradients; score
    :math:`s_\ell = \hat r_\ell / \sum_j \hat r_j`; rank
    :math:`r_\ell = clip(round(r_{min} + c\,s_\ell), r_{min}, r_{max})` with the largest c that
    the budget allows.

    Source:
        GARD, sections 3.2 (signal) and 3.3 (allocation). Differs: what rounding leaves of the
        budget is spent unless ``spend_leftover`` is off.
    """

    name: ClassVar[str] = "gard"
    summary: ClassVar[str] = "rank in proportion to the effective rank of mini-batch gradients"
    source: ClassVar[str] = "GARD (static), sections 3.2 and 3.3"

    energy: float = option(0.9, "energy threshold of the effective rank, in (0, 1]")
    r_min: int = option(0, "smallest rank of every target")
    r_max: int | None = option(None, "largest rank; none: min(d_in, d_out)")
    estimator: str = option("sketch", "'sketch', or 'dense' (exact, more memory and passes)")
    sketch_dim: int = option(128, "sketch size on either side")
    centring: bool = option(False, "remove the mean gradient first (covariance, not Gram)")
    fractional: bool = option(False, "read effective ranks between whole numbers: fewer ties")
    spend_leftover: bool = option(True, "spend what rounding left; false: the paper's rule alone")

    def __post_init__(self) -> None:
        require(0 < self.energy <= 1, self.name, "energy", self.energy, "in (0, 1]")
        check_rank_bounds(self.name, self.r_min, self.r_max)
        known = self.estimator in ESTIMATORS
        require(known, self.name, "estimator", self.estimator, "'sketch' or 'dense'")
        check_sketch(self.name, "sketch_dim", self.sketch_dim)

    def signals(self) -> tuple[Signal, ...]:
        """Return the spectrum over batches."""
        return (Spectrum(self.estimator, self.sketch_dim),)

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return normalised effective ranks.

        Args:
            targets: The targets.
            measurement: Measurement with the spectrum signal.

        Returns:
            Scores that sum to 1, and per target the effective rank and its saturation, the
            share of the largest effective rank that M batches allow, ``ceil(energy * M)``.

        Raises:
            MeasurementError: If nothing was measured.
        """
        if measurement is None:
            raise MeasurementError("method 'gard' needs a measurement; none was given.")
        return by_effective_rank(targets, measurement, self.energy, self.centring, self.fractional)

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return ranks by the proportional rule.

        Args:
            targets: The targets.
            assessment: Scores.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        return proportional(
            targets,
            assessment.scores,
            budget,
            r_min=self.r_min,
            r_max=self.r_max,
            spend_leftover=self.spend_leftover,
        )
