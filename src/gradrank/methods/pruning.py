"""What methods share that start with too many directions and take some away while training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from gradrank.allocation import keep_directions, uniform
from gradrank.core.errors import BudgetError, MeasurementError, OptionError
from gradrank.core.targets import Target
from gradrank.methods.course import Decision
from gradrank.methods.method import Assessment, option, require
from gradrank.schedule import Cubic
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement
from gradrank.signals.sensitivity import Observation, Sensitivity

AFTER = ("continue", "restart")
INITS = ("svd", "keep")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningOptions:
    """The options of every method that prunes directions; its plan is uniform LoRA's.

    A plan keeps the budget, and these methods begin above it: :func:`gradrank.reserve` and
    :class:`gradrank.CapacityCallback` widen the adapter to ``initial_rank`` before training.
    """

    name: ClassVar[str] = "pruning"

    initial_rank: int | None = option(
        None, "rank to begin with; none: twice the uniform rank of the budget"
    )
    r_min: int = option(0, "directions that every target keeps; 0: a target may lose its adapter")
    interval: int = option(10, "optimizer steps between prunings")
    warmup: int | None = option(None, "steps before the first pruning; none: a tenth of the run")
    final: int | None = option(None, "steps after the last pruning; none: three tenths of the run")
    orthogonality: float = option(0.1, "weight of |PtP - I|^2 + |QQt - I|^2; 0: none")
    init: str = option(
        "svd",
        "'svd': P, Q orthonormal, lambda 0 in a new adapter; 'keep': P = B = 0, Q = A, lambda 1",
    )
    after: str = option(
        "continue", "after the last pruning: 'continue', or 'restart' what is left from zero"
    )

    def check_pruning(self) -> None:
        """Refuse options out of range.

        Raises:
            OptionError: Naming the option.
        """
        legal = self.initial_rank is None or self.initial_rank >= 1
        require(legal, self.name, "initial_rank", self.initial_rank, "1 or more, or none")
        require(self.r_min >= 0, self.name, "r_min", self.r_min, "0 or more")
        require(self.interval >= 1, self.name, "interval", self.interval, "1 or more")
        for name, least in (("warmup", 0), ("final", 1)):
            value = getattr(self, name)
            legal = value is None or value >= least
            require(legal, self.name, name, value, f"{least} or more, or none")
        legal = 0 <= self.orthogonality < math.inf
        require(legal, self.name, "orthogonality", self.orthogonality, "0 or more")
        require(self.init in INITS, self.name, "init", self.init, " or ".join(map(repr, INITS)))
        require(self.after in AFTER, self.name, "after", self.after, " or ".join(map(repr, AFTER)))

    def signals(self) -> tuple[Signal, ...]:
        """Return nothing: what is looked at is the adapter while it trains."""
        return ()

    def assess(
        self,
        targets: Sequence[Target],
        measurement: Measurement | None,
    ) -> Assessment:
        """Return equal scores, since nothing is known before training."""
        return Assessment({target.name: 1 / len(targets) for target in targets})

    def ranks(
        self,
        targets: Sequence[Target],
        assessment: Assessment,
        budget: int,
    ) -> dict[str, int]:
        """Return uniform ranks within the budget; see the class.

        Args:
            targets: The targets.
            assessment: Not looked at.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        self._check_floor(targets, budget)
        return uniform(targets, budget)

    def start(self, targets: Sequence[Target], budget: int) -> dict[str, int]:
        """Return the ranks that training begins with.

        Args:
            targets: The targets.
            budget: Parameters in the end.

        Returns:
            Rank per target, at most ``min(d_in, d_out)``.

        Raises:
            OptionError: If they do not cost more than the budget, so that nothing would be pruned.
        """
        self._check_floor(targets, budget)
        even = max(1, round(budget / sum(target.cost for target in targets)))
        rank = 2 * even if self.initial_rank is None else self.initial_rank
        ranks = {target.name: min(rank, target.max_rank) for target in targets}
        spent = sum(ranks[target.name] * target.cost for target in targets)
        if spent <= budget:
            raise OptionError(
                f"method '{self.name}' would begin with rank {rank}, {spent:,} parameters, which "
                f"is within the budget of {budget:,}: there is nothing to take away. Raise "
                "initial_rank, or lower the budget."
            )
        return ranks

    def _check_floor(self, targets: Sequence[Target], budget: int) -> None:
        """Refuse a budget that cannot pay ``r_min`` directions of every target.

        Raises:
            BudgetError: Naming both.
        """
        floor = sum(min(self.r_min, target.max_rank) * target.cost for target in targets)
        if budget < floor:
            raise BudgetError(
                f"budget {budget:,} is below the floor of {floor:,} parameters: method "
                f"'{self.name}' keeps r_min = {self.r_min} on each of {len(targets)} targets. "
                "Raise the budget, or lower r_min (r_min=0 lets targets lose their adapter)."
            )

    def timetable(self, total_steps: int, score_every: int) -> Cubic:
        """Return the schedule of a run.

        Args:
            total_steps: Its optimizer steps.
            score_every: Steps between two looks at importance.

        Returns:
            The schedule.
        """
        warmup = total_steps // 10 if self.warmup is None else self.warmup
        final = max(1, 3 * total_steps // 10) if self.final is None else self.final
        return Cubic(total_steps, self.interval, warmup, final, score_every)


class Importance(Protocol):
    """What a method remembers of the gradients, and how it scores directions by it."""

    def take(self, observation: Observation) -> None:
        """Take in one look at the gradients."""
        ...

    def scores(self, targets: Sequence[Target], lam: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a score per direction ``[r]`` of every target; larger is kept longer."""
        ...

    def follow(self, keep: Mapping[str, tuple[int, ...]]) -> None:
        """Forget the directions that were taken away."""
        ...

    def facts(self) -> dict[str, float]:
        """Return numbers for the record of a decision."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return everything that is remembered."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        ...


class PruningCourse:
    """A method's pruning in one run: schedule, importance, and what stays within the budget."""

    def __init__(
        self,
        options: PruningOptions,
        importance: Importance,
        sensitivity: Sensitivity,
        targets: Sequence[Target],
        budget: int,
        total_steps: int,
        score_every: int,
    ) -> None:
        self._options, self._importance = options, importance
        self._targets, self._budget = tuple(targets), budget
        self.schedule = options.timetable(total_steps, score_every)
        self.ceilings = options.start(targets, budget)
        self.sensitivity = sensitivity
        # A direction that begins as LoRA's do is not of unit length, and is not pulled there.
        self.orthogonality, self.whole_penalty = options.orthogonality, options.init == "svd"
        self.init = options.init
        self.elastic = False
        self.restarts = options.after == "restart"

    def allowed(self, step: int, start: int) -> int:
        """Return how many parameters may be in use after a step.

        Args:
            step: The step.
            start: Parameters in use at the beginning.
        """
        return self.schedule.allowed(step, start, self._budget)

    def take(self, observation: Observation) -> None:
        """Take in one look at the gradients.

        Args:
            observation: Gradients and weights.
        """
        self._importance.take(observation)

    def choose(self, allowed: int, lam: Mapping[str, Tensor]) -> Decision:
        """Return which directions stay.

        Args:
            allowed: Parameters that may be kept.
            lam: λ ``[r]`` of each target that still has directions.

        Returns:
            The decision.

        Raises:
            MeasurementError: If a score is NaN.
        """
        scores = self._importance.scores(self._targets, lam)
        listed = {name: found.tolist() for name, found in scores.items()}
        spoiled = [name for name, found in listed.items() if any(map(math.isnan, found))]
        if spoiled:
            raise MeasurementError(
                f"the importance of directions of {len(spoiled)} target(s) ('{spoiled[0]}', ...) "
                "is NaN; training has diverged. Lower the learning rate."
            )
        keep = keep_directions(self._targets, listed, allowed, self._options.r_min)
        kept = {name: [listed[name][i] for i in found] for name, found in keep.items()}
        details = {"importance": {name: math.fsum(found) for name, found in kept.items()}}
        ranks = {name: len(found) for name, found in keep.items()}
        return Decision(ranks, details, self._importance.facts(), keep)

    def follow(self, keep: Mapping[str, tuple[int, ...]]) -> None:
        """Forget the directions that were taken away.

        Args:
            keep: Indices of those that stayed, per target.
        """
        self._importance.follow(keep)

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered."""
        return self._importance.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Args:
            state: Tensors by key.
        """
        self._importance.restore(state)
