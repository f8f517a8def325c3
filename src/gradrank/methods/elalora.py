"""ElaLoRA's rule on gradrank's engine: the least important directions make room for new ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradrank.allocation import proportional
from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.methods.course import Decision
from gradrank.methods.importance import ElementImportance
from gradrank.methods.method import Assessment, check_rank_bounds, option, require
from gradrank.schedule import Cubic
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement
from gradrank.signals.sensitivity import Observation, TrainingGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class ElaLora:
    """ElaLoRA: in every round the b least important directions go, and others take their room.

    It begins and ends with the budget, and is never above it.

    Source:
        ElaLoRA, arXiv 2504.00254, section 3. Differs: the budget counts parameters and not ranks,
        so that a round gives what the directions that went have paid for, and not b directions;
        a target that loses directions in a round gets none in it; every target keeps one; b is the
        same in every round, where the paper has a schedule.

    **Notes**: a new direction begins with λ = 0 and averages of 0, so that its score is the lowest
    for some time. From the fourth round on most directions that go are those that came a round
    before (6 to 8 of 8 on a tiny decoder, rounds every 5 or 10 steps), and older ones move little.
    """

    name: ClassVar[str] = "elalora"
    summary: ClassVar[str] = "ElaLoRA: prune and grow directions by sensitivity x uncertainty"
    source: ClassVar[str] = "ElaLoRA, arXiv 2504.00254, section 3"

    moves: int = option(8, "directions b that a round takes away, 1 or more")
    max_growth: int = option(2, "new directions k that a target gets in a round, 1 or more")
    r_min: int = option(1, "smallest rank of every target, 1 or more")
    r_max: int | None = option(None, "largest rank; none: min(d_in, d_out)")
    interval: int = option(10, "optimizer steps between rounds")
    warmup: int | None = option(None, "steps before the first round; none: a tenth of the run")
    final: int | None = option(None, "steps after the last round; none: three tenths of the run")
    orthogonality: float = option(0.1, "weight of |PtP - I|^2 + |QQt - I|^2; 0: none")
    beta1: float = option(0.85, "smoothing of sensitivity, in [0, 1)")
    beta2: float = option(0.85, "smoothing of its uncertainty, in [0, 1)")

    def __post_init__(self) -> None:
        for name in ("moves", "max_growth", "interval", "r_min"):
            require(getattr(self, name) >= 1, self.name, name, getattr(self, name), "1 or more")
        check_rank_bounds(self.name, self.r_min, self.r_max)
        for name, least in (("warmup", 0), ("final", 1)):
            value = getattr(self, name)
            legal = value is None or value >= least
            require(legal, self.name, name, value, f"{least} or more, or none")
        legal = 0 <= self.orthogonality < math.inf
        require(legal, self.name, "orthogonality", self.orthogonality, "0 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, self.name, name, value, "in [0, 1)")

    def signals(self) -> tuple[Signal, ...]:
        """Return nothing: what is looked at is the adapter while it trains."""
        return ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return equal scores, since nothing is known before training.

        Args:
            targets: The targets.
            measurement: Not looked at.

        Returns:
            Scores that sum to 1.
        """
        return Assessment({target.name: 1 / len(targets) for target in targets})

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return the ranks to begin with: as equal as the budget allows.

        Args:
            targets: The targets.
            assessment: Equal scores.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        return proportional(targets, assessment.scores, budget, r_min=self.r_min, r_max=self.r_max)

    def course(self, targets: Sequence[Target], budget: int, total_steps: int) -> "ElaLoraCourse":
        """Return the course of one run.

        Args:
            targets: The targets.
            budget: Parameters that may be in use at any moment.
            total_steps: Optimizer steps of the run.

        Returns:
            The course, before its first round.
        """
        importance = ElementImportance(self.beta1, self.beta2, "product", 0.0)
        return ElaLoraCourse(self, importance, targets, budget, total_steps)


class ElaLoraCourse:
    """ElaLoRA in one run."""

    def __init__(
        self,
        method: ElaLora,
        importance: ElementImportance,
        targets: Sequence[Target],
        budget: int,
        total_steps: int,
    ) -> None:
        self._method, self._importance = method, importance
        self._targets, self._budget = tuple(targets), budget
        warmup = total_steps // 10 if method.warmup is None else method.warmup
        final = max(1, 3 * total_steps // 10) if method.final is None else method.final
        self.schedule = Cubic(total_steps, method.interval, warmup, final)
        # Training begins with the ranks of the plan; nothing is reserved above them.
        self.ceilings = {target.name: 0 for target in self._targets}
        self.sensitivity = TrainingGradient()
        self.orthogonality, self.whole_penalty = method.orthogonality, True
        self.init, self.restarts, self.elastic = "svd", False, True
        self._grown: dict[str, int] = {}

    def allowed(self, step: int, start: int) -> int:
        """Return the budget, which holds at every step.

        Args:
            step: The step.
            start: Parameters in use at the beginning.
        """
        return self._budget

    def take(self, observation: Observation) -> None:
        """Take in one look at the gradients.

        Args:
            observation: Gradients and weights.
        """
        self._importance.take(observation)

    def choose(self, allowed: int, lam: Mapping[str, Tensor]) -> Decision:
        """Return which directions stay, and which targets get new ones.

        Args:
            allowed: Parameters that may be in use.
            lam: λ ``[r]`` of each target.

        Returns:
            The decision; ranks above what is kept are new directions.

        Raises:
            MeasurementError: If a score is NaN.
        """
        found = self._importance.scores(self._targets, lam)
        scores = {name: score.tolist() for name, score in found.items()}
        spoiled = [name for name, listed in scores.items() if any(map(math.isnan, listed))]
        if spoiled:
            raise MeasurementError(
                f"the importance of directions of {len(spoiled)} target(s) ('{spoiled[0]}', ...) "
                "is NaN; training has diverged. Lower the learning rate."
            )
        keep = self._prune(scores)
        spent = sum(len(keep[target.name]) * target.cost for target in self._targets)
        self._grown = self._grow(scores, keep, allowed - spent)
        details = {
            name: math.fsum(scores[name][index] for index in kept) for name, kept in keep.items()
        }
        return Decision(
            {name: len(kept) + self._grown.get(name, 0) for name, kept in keep.items()},
            {"importance": details},
            self._importance.facts(),
            keep,
        )

    def _prune(self, scores: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, ...]]:
        """Take the b lowest scores away; of equal ones the later direction and name."""
        left = {name: set(range(len(listed))) for name, listed in scores.items()}
        reverse = [(name, i) for name in sorted(scores, reverse=True) for i in left[name]]
        rising = sorted(reverse, key=lambda place: (scores[place[0]][place[1]], -place[1]))
        gone = 0
        for name, index in rising:
            if gone < self._method.moves and len(left[name]) > self._method.r_min:
                left[name].remove(index)
                gone += 1
        return {name: tuple(sorted(kept)) for name, kept in left.items()}

    def _grow(
        self, scores: Mapping[str, Sequence[float]], keep: Mapping[str, tuple[int, ...]], left: int
    ) -> dict[str, int]:
        """Give the owner of each direction one more, from the highest score down."""
        method, grown = self._method, {}
        targets = {t.name: t for t in self._targets if len(keep[t.name]) == len(scores[t.name])}
        falling = sorted((-scores[name][i], i, name) for name in targets for i in keep[name])
        for _, _, name in falling:
            target, more = targets[name], grown.get(name, 0)
            most = min(target.max_rank, method.r_max or target.max_rank)
            room = more < method.max_growth and len(keep[name]) + more < most
            if room and target.cost <= left:
                grown[name] = more + 1
                left -= target.cost
        return grown

    def follow(self, keep: Mapping[str, tuple[int, ...]]) -> None:
        """Forget the directions that were taken away, and begin to remember the new ones.

        Args:
            keep: Indices of those that stayed, per target.
        """
        self._importance.follow(keep)
        self._importance.widen(self._grown)
        self._grown = {}

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered."""
        return self._importance.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Args:
            state: Tensors by key.
        """
        self._importance.restore(state)
