"""How capacity moved while a run trained: ranks and decisions over time."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Decision:
    """One allocation decision as the record tells it; None or empty where it does not.

    Attributes:
        step: When it was taken.
        parameters: Adapter parameters in use after it.
        budget: Parameters allowed after it.
        moved: Parameters given to targets that grew.
        changed: Targets whose rank changed.
        seconds: What deciding and resizing took.
        effective_rank: Of the window that was measured, by target.
        smoothed: Moving average of the effective rank, by target.
        energy: Mean squared gradient norm of the window, by target.
        importance: Sum of the scores of the directions kept, by target, in the method's unit.
        passes: Scoring passes so far.
        attributed: Sum of all attributions since the decision before, nats.
        loss_change: What the adapter changed the loss by, nats.
        gap: Completeness gap: their distance, relative to the change.
    """

    step: int
    parameters: int | None = None
    budget: int | None = None
    moved: int | None = None
    changed: int | None = None
    seconds: float | None = None
    effective_rank: Mapping[str, float] = field(default_factory=dict)
    smoothed: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    passes: float | None = None
    attributed: float | None = None
    loss_change: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class History:
    """Ranks and decisions over time.

    Attributes:
        ranks: ``(step, ranks)`` by rising step; a target that an entry leaves out has rank 0.
        decisions: By rising step.
        costs: Parameters of one rank (``d_in + d_out``) by target, where the plan tells its shape.
        budget: The plan's budget, or None.
        tolerance: Completeness gap above which the method itself would warn, or None.
    """

    ranks: tuple[tuple[int, Mapping[str, int]], ...]
    decisions: tuple[Decision, ...]
    costs: Mapping[str, int]
    budget: int | None
    tolerance: float | None = None

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Every target with a rank at any time, in order of appearance."""
        return tuple(dict.fromkeys(name for _, ranks in self.ranks for name in ranks))

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """Every target that any decision measured, in order of appearance."""
        return tuple(
            dict.fromkeys(
                name
                for decision in self.decisions
                for column in ("effective_rank", "smoothed", "energy", "importance")
                for name in getattr(decision, column)
            )
        )

    @property
    def start(self) -> Mapping[str, int]:
        """The first known ranks."""
        return self.ranks[0][1] if self.ranks else {}

    @property
    def final(self) -> Mapping[str, int]:
        """The last known ranks."""
        return self.ranks[-1][1] if self.ranks else {}

    @cached_property
    def events(self) -> tuple["Event", ...]:
        """Every decision and every change of ranks, by rising step.

        What a decision does not tell is taken from the ranks, where shapes allow it.
        """
        told = {decision.step: decision for decision in self.decisions}
        steps = sorted({*told, *(step for step, _ in self.ranks[1:])})
        return tuple(self._event(told.get(step, Decision(step))) for step in steps)

    @cached_property
    def asked(self) -> int | None:
        """The budget that was asked for: the plan's, else what was allowed last."""
        told = [d.budget for d in self.decisions if d.budget is not None]
        return self.budget if self.budget is not None else (told[-1] if told else None)

    @cached_property
    def falls(self) -> bool:
        """Whether capacity came down to its budget from above, as methods do that prune."""
        told = [d.budget for d in self.decisions if d.budget is not None]
        if told and told[-1] < told[0]:
            return True
        start = self.cost_of(self.start) if self.ranks else None
        if start is None or self.asked is None or start <= self.asked:
            return False
        used = [self.cost_of(ranks) or 0 for _, ranks in self.ranks]
        return all(after <= before for before, after in pairwise(used))

    @cached_property
    def usage(self) -> tuple[tuple[int, int | None, int | None], ...]:
        """``(step, parameters in use, parameters allowed)`` at the start and after each event.

        At the start the allowance is known only if it never changes.
        """
        points = [(e.step, e.parameters, e.budget) for e in self.events]
        if self.ranks and self.ranks[0][0] < (points[0][0] if points else 1):
            step, ranks = self.ranks[0]
            limits = {limit for _, _, limit in points}
            if self.budget is not None:
                limits.add(self.budget)
            known = len(limits) == 1 and not self.falls
            points.insert(0, (step, self.cost_of(ranks), limits.pop() if known else None))
        return tuple(points)

    @cached_property
    def peak(self) -> int | None:
        """Most parameters in use at any time, as far as it is known."""
        return max((used for _, used, _ in self.usage if used is not None), default=None)

    @cached_property
    def settled(self) -> int | None:
        """The step from which on no more is in use than was asked for; None if there is none."""
        known = [(step, used) for step, used, _ in self.usage if used is not None]
        if self.asked is None or not known or known[-1][1] > self.asked:
            return None
        above = [i for i, (_, used) in enumerate(known) if used > self.asked]
        return known[above[-1] + 1][0] if above else known[0][0]

    @property
    def only_shrinks(self) -> bool:
        """Whether decisions took parameters away and never gave any."""
        return any(e.taken for e in self.events) and not any(e.moved for e in self.events)

    @property
    def passes(self) -> float | None:
        """Scoring passes of the whole run, or None if no decision tells them."""
        return max((d.passes for d in self.decisions if d.passes is not None), default=None)

    def ranks_at(self, step: int) -> Mapping[str, int]:
        """Return the ranks in use after a step.

        Args:
            step: The step.

        Returns:
            Rank by target; empty before the first known ranks.
        """
        position = bisect_right(self._rank_steps, step) - 1
        return self.ranks[position][1] if position >= 0 else {}

    def cost_of(self, ranks: Mapping[str, int]) -> int | None:
        """Return what ranks cost.

        Args:
            ranks: Rank by target.

        Returns:
            Parameters, or None if the shape of a target in use is unknown.
        """
        if not all(name in self.costs for name, rank in ranks.items() if rank):
            return None
        return sum(rank * self.costs[name] for name, rank in ranks.items() if rank)

    def change(self, before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
        """Return how ranks differ.

        Args:
            before: Earlier ranks.
            after: Later ranks.

        Returns:
            Difference by target, without those that stayed.
        """
        differences = {name: after.get(name, 0) - before.get(name, 0) for name in self.targets}
        return {name: value for name, value in differences.items() if value}

    def _event(self, told: Decision) -> "Event":
        position = bisect_right(self._rank_steps, told.step) - 1
        computed = Recount()
        if position >= 0:
            step, ranks = self.ranks[position]
            before = self.ranks[position - 1][1] if step == told.step and position else ranks
            change = self.change(before, ranks)
            grown = {name: value for name, value in change.items() if value > 0}
            shrunk = {name: -value for name, value in change.items() if value < 0}
            worth = self.cost_of(grown), self.cost_of(shrunk)
            computed = Recount(self.cost_of(ranks), worth[0], len(change), worth[1])
        return Event(
            step=told.step,
            parameters=_first(told.parameters, computed.parameters),
            # What is allowed on the way down to a budget is known only where it is told.
            budget=told.budget if self.falls else _first(told.budget, self.budget),
            moved=_first(told.moved, computed.moved),
            changed=_first(told.changed, computed.changed),
            taken=computed.taken,
            decision=told,
            recount=computed,
        )

    @cached_property
    def _rank_steps(self) -> list[int]:
        return [step for step, _ in self.ranks]


@dataclass(frozen=True, slots=True)
class Recount:
    """What the ranks themselves say about a decision; None where they cannot."""

    parameters: int | None = None
    moved: int | None = None
    changed: int | None = None
    taken: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One decision or change of ranks: as told, else as counted from the ranks.

    ``recount`` always holds the latter, so that a record that contradicts itself is noticed;
    ``taken`` (parameters that targets lost) is known from ranks only; ``decision`` is what the
    record tells, empty for a change of ranks without a decision.
    """

    step: int
    parameters: int | None
    budget: int | None
    moved: int | None
    changed: int | None
    taken: int | None
    decision: Decision
    recount: Recount


def _first(told: int | None, computed: int | None) -> int | None:
    return computed if told is None else told
