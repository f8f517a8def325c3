"""GARD, dynamic: ranks follow the smoothed effective rank of recent gradients while training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradrank.allocation import proportional
from gradrank.core.errors import MeasurementError, OptionError
from gradrank.core.targets import Target
from gradrank.methods.course import Decision
from gradrank.methods.method import (
    Assessment,
    by_effective_rank,
    check_rank_bounds,
    check_sketch,
    normalised,
    option,
    require,
)
from gradrank.schedule import Schedule
from gradrank.signals.measure import ESTIMATORS, Signal, Spectrum
from gradrank.signals.measurement import Measurement


@dataclass(frozen=True, slots=True)
class DynamicGard:
    r"""Gradient-spectral rank allocation that goes on while the model trains.

    Every :math:`\tau` steps: effective rank of the last mini-batches' gradients, smoothed by
    :math:`\hat r \leftarrow \beta\,\hat r + (1 - \beta)\,\hat r_{new}`, then static GARD's rule
    under the same budget with :math:`|\Delta r| \le \Delta_{max}`. Every target keeps at least
    rank 1, since a target that has no adapter has nowhere to grow from.

    Source:
        GARD, section 3.4. The paper gives no values for its interval, window, β or Δ_max; these
        defaults are ours. Differs: what rounding leaves of the budget is spent unless
        ``spend_leftover`` is off.
    """

    name: ClassVar[str] = "gard-dynamic"
    summary: ClassVar[str] = "GARD, ranks move while training (early-dynamic: freeze_after)"
    source: ClassVar[str] = "GARD (dynamic and early-dynamic), section 3.4"

    energy: float = option(0.9, "energy threshold of the effective rank, in (0, 1]")
    r_min: int = option(1, "smallest rank of every target, at least 1")
    r_max: int | None = option(None, "largest rank; none: twice the uniform rank of the budget")
    estimator: str = option("sketch", "'sketch', or 'dense' (exact, more memory, one process)")
    sketch_dim: int = option(128, "sketch size on either side")
    centring: bool = option(False, "remove the mean gradient first (covariance, not Gram)")
    fractional: bool = option(False, "read effective ranks between whole numbers: fewer ties")
    spend_leftover: bool = option(True, "spend what rounding left; false: the paper's rule alone")
    interval: int = option(50, "optimizer steps between decisions (tau)")
    window: int = option(16, "recent mini-batches that a decision looks at, per process")
    beta: float = option(0.5, "smoothing of effective ranks between decisions, in [0, 1)")
    max_delta: int = option(2, "largest change of a target's rank in one decision")
    warmup: int = option(0, "steps before the first decision may fall due")
    freeze_after: int | None = option(None, "early-dynamic: no decision after this step (T_adapt)")
    start: str = option("uniform", "ranks to begin with: 'uniform', or 'measured' (static GARD)")
    shrink: str = option("svd", "what shrinking keeps: 'svd' directions of B A, or by 'norm'")
    grow: str = option("random", "where ranks grow: 'random', or 'gradient' directions")

    def __post_init__(self) -> None:
        require(0 < self.energy <= 1, self.name, "energy", self.energy, "in (0, 1]")
        require(self.r_min >= 1, self.name, "r_min", self.r_min, "1 or more")
        check_rank_bounds(self.name, self.r_min, self.r_max)
        require(self.estimator in ESTIMATORS, self.name, "estimator", self.estimator, "known")
        check_sketch(self.name, "sketch_dim", self.sketch_dim)
        for name, least in (("interval", 1), ("window", 2), ("max_delta", 1), ("warmup", 0)):
            value = getattr(self, name)
            require(value >= least, self.name, name, value, f"{least} or more")
        require(0 <= self.beta < 1, self.name, "beta", self.beta, "in [0, 1)")
        legal = self.freeze_after is None or self.freeze_after >= 1
        require(legal, self.name, "freeze_after", self.freeze_after, "1 or more, or none")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            require(value in known, self.name, name, value, " or ".join(map(repr, known)))

    def signals(self) -> tuple[Signal, ...]:
        """Return the spectrum over batches if the first ranks are measured, else nothing."""
        return (Spectrum(self.estimator, self.sketch_dim),) if self.start == "measured" else ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return the scores that the first ranks follow.

        Args:
            targets: The targets.
            measurement: Measurement with the spectrum signal; None for a uniform start.

        Returns:
            Scores that sum to 1: equal, or normalised effective ranks.

        Raises:
            MeasurementError: If the start is measured and nothing was measured.
        """
        if self.start == "uniform":
            return Assessment({target.name: 1 / len(targets) for target in targets})
        if measurement is None:
            raise MeasurementError("gard-dynamic with start='measured' needs a measurement.")
        return by_effective_rank(targets, measurement, self.energy, self.centring, self.fractional)

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return the ranks to begin with.

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
            r_max=self._most(targets, budget),
            spend_leftover=self.spend_leftover,
        )

    def course(self, targets: Sequence[Target], budget: int, total_steps: int) -> "GardCourse":
        """Return the course of one run.

        Args:
            targets: The targets.
            budget: Parameters that may be spent at any moment.
            total_steps: Optimizer steps of the run.

        Returns:
            The course, before its first decision.
        """
        return GardCourse(self, targets, budget, total_steps)

    def _most(self, targets: Sequence[Target], budget: int) -> int:
        uniform = max(1, round(budget / sum(target.cost for target in targets)))
        return max(2 * uniform if self.r_max is None else self.r_max, self.r_min)


_CHOICES = {
    "start": ("uniform", "measured"),
    "shrink": ("svd", "norm"),
    "grow": ("random", "gradient"),
}


class GardCourse:
    """Dynamic GARD in one run; its memory is one smoothed effective rank per target."""

    def __init__(
        self, method: DynamicGard, targets: Sequence[Target], budget: int, total_steps: int
    ) -> None:
        self._method, self._targets, self._budget = method, tuple(targets), budget
        self.schedule = Schedule(
            total_steps, method.interval, method.window, method.warmup, method.freeze_after
        )
        self.signal = Spectrum(method.estimator, method.sketch_dim)
        most = method._most(targets, budget)
        self.ceilings = {target.name: min(target.max_rank, most) for target in targets}
        self.shrink, self.grow = method.shrink, method.grow
        self._smoothed: dict[str, float] = {}

    def allowed(self, step: int, start: int) -> int:
        """Return the budget, which holds at every step."""
        return self._budget

    def decide(self, ranks: Mapping[str, int], measurement: Measurement) -> Decision:
        """Return new ranks from the window's spectrum.

        Args:
            ranks: Ranks in use.
            measurement: Measurement of the window.

        Returns:
            The decision. Where no target has a gradient, the ranks in use.
        """
        method = self._method
        spectrum = measurement.need_spectrum()
        found = spectrum.effective_ranks(method.energy, method.centring)
        finer = method.fractional
        latest = spectrum.fractional_ranks(method.energy, method.centring) if finer else found
        beta = method.beta if self._smoothed else 0.0
        self._smoothed = {
            t.name: beta * self._smoothed.get(t.name, 0.0) + (1 - beta) * latest[t.name]
            for t in self._targets
        }
        details = {
            "effective_rank": {name: float(rank) for name, rank in found.items()},
            "smoothed": dict(self._smoothed),
            "energy": {name: float(gram.trace()) for name, gram in spectrum.gram.items()},
        }
        if not any(self._smoothed.values()):
            return Decision(dict(ranks), details)
        moved = proportional(
            self._targets,
            normalised(self._smoothed),
            self._budget,
            r_min=method.r_min,
            spend_leftover=method.spend_leftover,
            within=self._reach(ranks),
        )
        return Decision(moved, details)

    def _reach(self, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Ranks that one decision may give each target."""
        method, delta = self._method, self._method.max_delta
        reach, floor = {}, 0
        for target in self._targets:
            now, ceiling = ranks[target.name], self.ceilings[target.name]
            low = min(max(min(method.r_min, target.max_rank), now - delta), now + delta)
            # A rank that begins above its ceiling comes down to it step by step.
            reach[target.name] = (low, max(low, min(ceiling, now + delta)))
            floor += low * target.cost
        if floor > self._budget:
            # Ranks that began below r_min cannot all be paid for yet; they wait.
            for name, (low, _) in reach.items():
                if low > ranks[name]:
                    reach[name] = (ranks[name], ranks[name])
        return reach

    def state(self) -> dict[str, Tensor]:
        """Return the smoothed effective ranks, in the order of the targets; empty at first."""
        if not self._smoothed:
            return {}
        values = [self._smoothed[target.name] for target in self._targets]
        return {"smoothed": torch.tensor(values, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Args:
            state: Tensors by key.

        Raises:
            OptionError: If they belong to another number of targets, or are damaged.
        """
        values = state["smoothed"].reshape(-1).tolist() if "smoothed" in state else []
        if values and len(values) != len(self._targets):
            raise OptionError(
                f"the saved state has {len(values)} targets, this run {len(self._targets)}. "
                "Resume with the plan of that run."
            )
        if not all(0 <= value < math.inf for value in values):
            raise OptionError(
                "the saved state holds a smoothed effective rank that is negative or not finite; "
                "it is damaged. Resume from another checkpoint."
            )
        names = [target.name for target in self._targets]
        self._smoothed = dict(zip(names, values, strict=True)) if values else {}
