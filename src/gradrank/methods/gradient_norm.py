"""Gradient-norm allocation, with and without depth: the plainest signal, a hard control to beat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import depth_scores, proportional
from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, check_rank_bounds, check_sketch, option
from gradrank.signals.measure import Signal, Spectrum
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """Rank in proportion to the root mean square of mini-batch gradient norms.

    With ``depth`` these are multiplied by the scores of the method ``depth`` at its defaults: 0.5
    in the first block of a stack, 1.5 in the last, linear between.

    Source:
        A common heuristic; a control.
    """

    name: ClassVar[str] = "gradient-norm"
    summary: ClassVar[str] = "rank in proportion to the gradient norm (control)"
    source: ClassVar[str] = "gradrank (common heuristic)"

    r_min: int = option(0, "smallest rank of every target")
    r_max: int | None = option(None, "largest rank; none: min(d_in, d_out)")
    sketch_dim: int = option(128, "sketch size on either side")
    depth: bool = option(False, "whether norms are weighted by depth, from 0.5 to 1.5")

    def __post_init__(self) -> None:
        check_rank_bounds(self.name, self.r_min, self.r_max)
        check_sketch(self.name, "sketch_dim", self.sketch_dim)

    def signals(self) -> tuple[Signal, ...]:
        """Return the spectrum over batches, whose trace is the mean squared norm."""
        return (Spectrum("sketch", self.sketch_dim),)

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return root-mean-square gradient norms, weighted by depth if that is asked for.

        Args:
            targets: The targets.
            measurement: Measurement with the spectrum signal.

        Returns:
            Scores. Unit: loss per weight.

        Raises:
            MeasurementError: If nothing was measured, or every gradient is zero.
        """
        if measurement is None:
            raise MeasurementError("method 'gradient-norm' needs a measurement; none was given.")
        traces = {t.name: float(measurement.gram(t.name).trace()) for t in targets}
        if not any(traces.values()):
            raise MeasurementError(f"all {len(targets)} targets have a zero gradient.")
        norms = {name: math.sqrt(max(trace, 0.0)) for name, trace in traces.items()}
        weights = depth_scores(targets) if self.depth else dict.fromkeys(norms, 1.0)
        return Assessment({name: norm * weights[name] for name, norm in norms.items()})

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
