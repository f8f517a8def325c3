"""PiLoRA: two ranks inside each layer, the larger one for output neurons that matter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradrank.allocation import uniform
from gradrank.allocation.neurons import RULES, Rule
from gradrank.allocation.partitions import check_floor, partition_of, trim
from gradrank.allocation.problem import refuse_empty
from gradrank.core.errors import MeasurementError
from gradrank.core.partition import NeuronPartition
from gradrank.core.targets import Target
from gradrank.methods.course import Decision
from gradrank.methods.hits import HitCounts
from gradrank.methods.method import Assessment, option, require
from gradrank.schedule import TwoStage
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement

STARTS = ("restart", "warm")


@dataclass(frozen=True, slots=True)
class PiLora:
    r"""PiLoRA: a first stage counts which neurons matter, a second one trains two groups of them.

    In the first stage (uniform LoRA of rank r) every K-th step takes
    :math:`S_i = \sum_j |(B G^A + G^B A)_{ij}|` of every output neuron and counts
    :math:`S_i > \bar S`. Neurons that are hit often enough are *dominant* and get rank r in the
    second stage, all others rank r'. The budget holds from the decision on; where the rule makes
    more neurons dominant than it pays for, the weakest of them give way.

    Source:
        PiLoRA, section 3 and Algorithm 1; for more than half of the looks (``majority``), since
        the paper does not say how often is "consistently". Differs: the budget.
    """

    name: ClassVar[str] = "pilora"
    summary: ClassVar[str] = "PiLoRA: two ranks per target, the larger for dominant output neurons"
    source: ClassVar[str] = "PiLoRA, section 3, equations 7 to 11, Algorithm 1"

    rank: int | None = option(
        None, "r, of stage 1 and of dominant rows; none: the largest with which half of all fit"
    )
    dominant_rank: int | None = option(None, "r of dominant rows in stage 2; none: rank")
    supplementary_rank: int = option(1, "r' of the other rows, at most r; 0: they have no adapter")
    interval: int = option(10, "optimizer steps between looks (K)")
    initial_steps: int | None = option(
        None, "steps of stage 1; none: ten looks within a third of the run, or a tenth of it"
    )
    rule: str = option("majority", "'majority', 'mean', 'top_fraction', 'cumulative' or 'random'")
    fraction: float = option(0.5, "share of rows, of 'top_fraction' and 'random', in [0, 1]")
    threshold: float = option(0.7, "share of importance, of 'cumulative', in [0, 1]")
    start: str = option("restart", "stage 2 begins with new factors: 'restart', or 'warm'")
    seed: int = option(0, "seed of 'random'")

    def __post_init__(self) -> None:
        lower = max(1, self.supplementary_rank)
        rules = {
            "supplementary_rank": (self.supplementary_rank >= 0, "0 or more"),
            "rank": (
                self.rank is None or self.rank >= lower,
                f"at least supplementary_rank and 1, {lower} here, or none",
            ),
            "dominant_rank": (
                self.dominant_rank is None or self.dominant_rank >= lower,
                f"at least supplementary_rank and 1, {lower} here, or none",
            ),
            "interval": (self.interval >= 1, "1 or more"),
            "initial_steps": (
                self.initial_steps is None or self.initial_steps >= 1,
                "1 or more, or none",
            ),
            "rule": (self.rule in RULES, f"one of {', '.join(RULES)}"),
            "fraction": (0 <= self.fraction <= 1, "in [0, 1]"),
            "threshold": (0 <= self.threshold <= 1, "in [0, 1]"),
            "start": (self.start in STARTS, " or ".join(map(repr, STARTS))),
        }
        for name, (ok, rule) in rules.items():
            require(ok, self.name, name, getattr(self, name), rule)

    def signals(self) -> tuple[Signal, ...]:
        """Return nothing: what is looked at is the adapter while it trains."""
        return ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return equal scores, since nothing is known before training."""
        return Assessment({target.name: 1 / len(targets) for target in targets})

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return the ranks of a plan, which keeps the budget: uniform, and at most r.

        :func:`gradrank.reserve` and :class:`gradrank.CapacityCallback` bring the adapter to r.

        Args:
            targets: The targets.
            assessment: Not looked at.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.
        """
        check_floor(targets, self.supplementary_ranks(targets), budget)
        first = self.first_rank(targets, budget)
        whole = {target.name: min(first, target.max_rank) for target in targets}
        if sum(whole[target.name] * target.cost for target in targets) <= budget:
            return whole
        return {name: min(rank, whole[name]) for name, rank in uniform(targets, budget).items()}

    def course(self, targets: Sequence[Target], budget: int, total_steps: int) -> "PiLoraCourse":
        """Return the course of one run.

        Args:
            targets: The targets.
            budget: Parameters in the second stage.
            total_steps: Optimizer steps of both stages.

        Returns:
            The course, before its first look.
        """
        return PiLoraCourse(self, targets, budget, total_steps)

    def timetable(self, total_steps: int) -> TwoStage:
        """Return the schedule of a run.

        Args:
            total_steps: Its optimizer steps.

        Returns:
            The schedule. Without ``initial_steps``, stage 1 takes a tenth of the run, more if ten
            looks take more but no more than a third for that, and has one look at least.
        """
        first = self.initial_steps
        if first is None:
            first = max(self.interval, total_steps // 10, min(total_steps // 3, 10 * self.interval))
        return TwoStage(total_steps, first, self.interval)

    def supplementary_ranks(self, targets: Sequence[Target]) -> dict[str, int]:
        """Return r' by target name, at most ``min(d_in, d_out)``.

        Args:
            targets: The targets.
        """
        return {target.name: min(self.supplementary_rank, target.max_rank) for target in targets}

    def first_rank(self, targets: Sequence[Target], budget: int) -> int:
        """Return r of the first stage.

        Args:
            targets: The targets.
            budget: Parameters in the second stage.

        Returns:
            The rank; where it is not given, the largest with which half of the rows of every
            target can be dominant, and at least r' and 1.
        """
        if self.rank is not None or self.dominant_rank is not None:
            return self.rank or self.dominant_rank or 1
        below, above = 0, max(target.max_rank for target in targets) + 1
        while above - below > 1:
            middle = (below + above) // 2
            fits = sum(self._half(target, middle) for target in targets) <= budget
            below, above = (middle, above) if fits else (below, middle)
        return max(below, self.supplementary_rank, 1)

    def _half(self, target: Target, rank: int) -> int:
        """Return the parameters of a target of which half of the rows, rounded up, are dominant."""
        upper, lower = (min(r, target.max_rank) for r in (rank, self.supplementary_rank))
        half = (1 << (target.d_out + 1) // 2) - 1
        return NeuronPartition(target.d_out, upper, lower, half).parameters(target.d_in)


class PiLoraCourse:
    """PiLoRA in one run: it counts hits, and splits every target once.

    Attributes:
        schedule: When it looks and when it decides.
        ceilings: Rank of every target in the first stage, by name.
        supplementary: Rank r' of rows that are not dominant, by name.
        start: What the second stage begins with.
    """

    def __init__(
        self, method: PiLora, targets: Sequence[Target], budget: int, total_steps: int
    ) -> None:
        self._targets, self._budget = tuple(targets), budget
        self._rule = Rule(method.rule, method.fraction, method.threshold, method.seed)
        self.schedule = method.timetable(total_steps)
        self.supplementary = method.supplementary_ranks(targets)
        check_floor(targets, self.supplementary, budget)
        first = method.first_rank(targets, budget)
        self.ceilings = {target.name: min(first, target.max_rank) for target in targets}
        second = method.dominant_rank or first
        self._dominant = {target.name: min(second, target.max_rank) for target in targets}
        self._memory = HitCounts(targets)
        self.start = method.start

    @property
    def hits(self) -> Mapping[str, Tensor]:
        """How often each neuron was above the mean of its target, ``[d_out]``, by target name."""
        return self._memory.hits

    @property
    def shares(self) -> Mapping[str, Tensor]:
        """Sum over looks of each neuron's share of the importance, ``[d_out]``, by target name."""
        return self._memory.shares

    @property
    def looks(self) -> Mapping[str, int]:
        """How many looks counted, by target name."""
        return self._memory.looks

    def allowed(self, step: int, start: int) -> int:
        """Return how many parameters may be in use after a step.

        Args:
            step: The step.
            start: Parameters in use at the beginning.

        Returns:
            As many as the first stage has, and the budget from the decision on.
        """
        decided = any(step >= decision for decision in self.schedule.decisions)
        return self._budget if decided or start <= self._budget else start

    def look(self, importance: Mapping[str, Tensor]) -> None:
        """Take in one look.

        Args:
            importance: ``S_i`` by target name, ``[d_out]``.
        """
        self._memory.look(importance)

    def split(self, allowed: int) -> Decision:
        """Return how the rows of each target are split.

        Args:
            allowed: Parameters that may be spent.

        Returns:
            The decision, with the share of dominant rows and the mean frequency of hits per
            target, and with how many rows gave way to the budget.

        Raises:
            MeasurementError: If nothing was looked at.
        """
        counts = self._memory.counts()
        if self._rule.name != "random" and not any(self._memory.looks.values()):
            raise MeasurementError(
                "no look at finite gradients was taken in the first stage, so that there is "
                "nothing to split neurons by. Lower the learning rate or interval, or train in "
                "bfloat16 or float32."
            )
        wished = {
            name: partition_of(
                self._rule.dominant(known, name), self._dominant[name], self.supplementary[name]
            )
            for name, known in counts.items()
        }
        strength = {name: self._rule.strength(known, name) for name, known in counts.items()}
        found = trim(self._targets, wished, strength, allowed)
        ranks = {name: split.lora_rank for name, split in found.items()}
        refuse_empty(ranks, allowed, "set supplementary_rank to 1 or more")
        rows, before = (sum(p.dominant_rows for p in ps.values()) for ps in (found, wished))
        details = {
            "dominant_share": {name: p.dominant_rows / p.d_out for name, p in found.items()},
            "hit_rate": {name: float(known.frequency.mean()) for name, known in counts.items()},
        }
        facts = {
            "looks": float(max(self._memory.looks.values())),
            "dominant_share": rows / sum(p.d_out for p in found.values()),
            "trimmed": float(before - rows),
        }
        return Decision(ranks, details, facts, partitions=found)

    def state(self) -> dict[str, Tensor]:
        """Return hits, shares and looks."""
        return self._memory.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Args:
            state: Tensors by key.
        """
        self._memory.restore(state)
