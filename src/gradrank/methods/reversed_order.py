"""Reversed allocation: another method's scores handed to the wrong targets on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import reverse_order
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, option, require
from gradrank.methods.registry import METHODS, create
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Reversed:
    """The target with the i-th largest score gets what the i-th smallest deserves.

    If a method's signal means anything, its reversal must do worse than uniform.

    Source:
        gradrank; a control.
    """

    name: ClassVar[str] = "reversed"
    summary: ClassVar[str] = "another method's scores in reversed order (control)"
    source: ClassVar[str] = "gradrank"

    of: str = option("gard", "method whose scores are reversed (with its default options)")

    def __post_init__(self) -> None:
        known = sorted(set(METHODS) - {"reversed", "permuted"})
        require(self.of in known, self.name, "of", self.of, f"one of {', '.join(known)}")

    def signals(self) -> tuple[Signal, ...]:
        """Return the other method's signals."""
        return create(self.of).signals()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return the other method's assessment in reversed order.

        Args:
            targets: The targets.
            measurement: Measurement that the other method needs.

        Returns:
            Scores and gains, each at another target.
        """
        base = create(self.of).assess(targets, measurement)
        donor = reverse_order(base.scores, targets)
        scores = {name: base.scores[donor[name]] for name in base.scores}
        gains = base.gains and {name: base.gains[donor[name]] for name in base.scores}
        return Assessment(scores, gains)

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return what the other method makes of these scores.

        Args:
            targets: The targets.
            assessment: Reversed scores.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        return create(self.of).ranks(targets, assessment, budget)
