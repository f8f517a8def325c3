"""Depth-linear allocation: a control that looks at nothing but the position of a block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import depth_scores, proportional
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, check_rank_bounds, option, require
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Depth:
    """Rank that grows (or falls) linearly with depth, within each stack of blocks.

    Source:
        A common heuristic; a control.
    """

    name: ClassVar[str] = "depth"
    summary: ClassVar[str] = "rank linear in depth (control)"
    source: ClassVar[str] = "gradrank (common heuristic)"

    first: float = option(0.5, "weight of the first block, 0 or more")
    last: float = option(1.5, "weight of the last block, 0 or more")
    r_min: int = option(0, "smallest rank of every target")
    r_max: int | None = option(None, "largest rank; none: min(d_in, d_out)")

    def __post_init__(self) -> None:
        require(self.first >= 0, self.name, "first", self.first, "0 or more")
        require(self.last >= 0, self.name, "last", self.last, "0 or more")
        total = self.first + self.last
        require(0 < total < float("inf"), self.name, "last", self.last, "finite, not both 0")
        check_rank_bounds(self.name, self.r_min, self.r_max)

    def signals(self) -> tuple[Signal, ...]:
        """Return no signal: depth is known from the names."""
        return ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return scores linear in depth.

        Args:
            targets: The targets.
            measurement: Not looked at.

        Returns:
            Scores from ``first`` to ``last``.
        """
        return Assessment(depth_scores(targets, self.first, self.last))

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
