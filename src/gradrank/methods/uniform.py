"""Uniform LoRA: the same rank everywhere. The control that every experiment runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import uniform
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same rank on every target; a remainder is spread evenly over depth.

    Source:
        Hu et al., LoRA, ICLR 2022; the control of every comparison.
    """

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "the same rank on every target (the control)"
    source: ClassVar[str] = "Hu et al., LoRA, ICLR 2022"

    def signals(self) -> tuple[Signal, ...]:
        """Return no signal: uniform LoRA looks at no data."""
        return ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return equal scores.

        Args:
            targets: The targets.
            measurement: Not looked at.

        Returns:
            A score of 1 for each target.
        """
        return Assessment({target.name: 1.0 for target in targets})

    def ranks(
        self,
        targets: Sequence[Target],
        assessment: Assessment,
        budget: int,
    ) -> dict[str, int]:
        """Return the largest equal ranks, and the remainder spread as single extra ranks.

        Args:
            targets: The targets.
            assessment: Not looked at.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        return uniform(targets, budget)
