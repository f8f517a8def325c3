"""Permuted allocation: another method's ranks shuffled between targets of the same shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import permute_within_shape
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, option, require
from gradrank.methods.registry import METHODS, create
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Permuted:
    """The same multiset of ranks for every shape, at other layers.

    Tells whether a method's gain comes from *which layers* it chose or only from how it divided
    the budget between kinds of modules. The parameter count is exactly the other method's.

    Source:
        gradrank; a control.
    """

    name: ClassVar[str] = "permuted"
    summary: ClassVar[str] = "another method's ranks permuted within same-shape targets (control)"
    source: ClassVar[str] = "gradrank"

    of: str = option("gard", "method whose ranks are permuted (with its default options)")
    seed: int = option(0, "seed of the permutation")

    def __post_init__(self) -> None:
        known = sorted(set(METHODS) - {"reversed", "permuted"})
        require(self.of in known, self.name, "of", self.of, f"one of {', '.join(known)}")

    def signals(self) -> tuple[Signal, ...]:
        """Return the other method's signals."""
        return create(self.of).signals()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return the other method's assessment as it is.

        Args:
            targets: The targets.
            measurement: Measurement that the other method needs.

        Returns:
            Scores and gains.
        """
        return create(self.of).assess(targets, measurement)

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return the other method's ranks, permuted within each shape.

        Args:
            targets: The targets.
            assessment: Scores.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        ranks = create(self.of).ranks(targets, assessment, budget)
        return permute_within_shape(targets, ranks, self.seed)
