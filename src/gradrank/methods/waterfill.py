"""Spectral water-filling: buy the directions of the mean gradient where a parameter buys most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import allocate_gains
from gradrank.core.targets import Target
from gradrank.methods.method import (
    Assessment,
    by_direction,
    check_rank_bounds,
    check_sketch,
    option,
    require,
)
from gradrank.signals.measure import MeanGradient, Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Waterfill:
    r"""Exact allocation by the singular values of each target's mean gradient.

    A rank-k update can follow k directions of the mean gradient :math:`\bar G`, and the k-th is
    worth its energy :math:`\sigma_k^2` (the first-order decrease of the loss per squared step
    along it). The exact multiple-choice knapsack spends the budget on the most valuable set.

    The spectrum is that of a matrix, over directions; GARD's is over batches.

    Source:
        gradrank; the sketch: Tropp, Yurtsever, Udell and Cevher 2017, algorithm 4.
    """

    name: ClassVar[str] = "waterfill"
    summary: ClassVar[str] = "exact knapsack over the energies of the mean gradient's directions"
    source: ClassVar[str] = "gradrank"

    r_min: int = option(0, "smallest rank of every target")
    r_max: int | None = option(None, "largest rank; none: as many directions as were measured")
    directions: int = option(40, "directions of the mean gradient to resolve")
    solver: str = option("exact", "'exact', or 'greedy' (bounded loss, for giant problems)")

    def __post_init__(self) -> None:
        check_rank_bounds(self.name, self.r_min, self.r_max)
        known = self.solver in {"exact", "greedy"}
        require(known, self.name, "solver", self.solver, "'exact' or 'greedy'")
        check_sketch(self.name, "directions", self.directions)

    def signals(self) -> tuple[Signal, ...]:
        """Return the mean gradient."""
        return (MeanGradient(self.directions),)

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return the energy of each direction; the score of a target is their sum.

        Args:
            targets: The targets.
            measurement: Measurement with the mean-gradient signal.

        Returns:
            Gains per direction (squared singular values) and their sums.

        Raises:
            MeasurementError: If nothing was measured, or every gradient is zero.
        """
        return by_direction(self.name, targets, measurement)

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return the ranks whose directions hold the most energy within the budget.

        Args:
            targets: The targets.
            assessment: Gains per direction.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        gains = assessment.gains or {}
        return allocate_gains(
            targets, gains, budget, r_min=self.r_min, r_max=self.r_max, solver=self.solver
        )
