"""Random allocation: the control that shows what placement by chance is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import proportional, random_scores
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, check_rank_bounds, option
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class RandomScores:
    """Rank in proportion to exponential random numbers, seeded by the target's name.

    Source:
        gradrank; a control.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "random allocation at the same budget (control)"
    source: ClassVar[str] = "gradrank"

    seed: int = option(0, "seed of the random scores")
    r_min: int = option(0, "smallest rank of every target")
    r_max: int | None = option(None, "largest rank; none: min(d_in, d_out)")

    def __post_init__(self) -> None:
        check_rank_bounds(self.name, self.r_min, self.r_max)

    def signals(self) -> tuple[Signal, ...]:
        """Return no signal: chance looks at no data."""
        return ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return random scores.

        Args:
            targets: The targets.
            measurement: Not looked at.

        Returns:
            Exponentially distributed scores.
        """
        return Assessment(random_scores(targets, self.seed))

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
        return proportional(targets, assessment.scores, budget, r_min=self.r_min, r_max=self.r_max)
