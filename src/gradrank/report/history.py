"""How capacity moved while a run trained, read with care: ranks and decisions over time."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradrank.record import RunRecord
from gradrank.report.text import as_count, as_float, clean


@dataclass(frozen=True, slots=True)
class Decision:
    """One allocation decision as the record tells it; None or empty where it does not.

    Attributes:
        step: When it was taken.
        parameters: Adapter parameters in use after it.
        budget: The budget in force.
        moved: Parameters given to targets that grew.
        changed: Targets whose rank changed.
        seconds: What measuring, deciding and resizing took.
        effective_rank: Of the window that was measured, by target.
        smoothed: Moving average of the effective rank, by target.
        energy: Mean squared gradient norm of the window, by target.
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


@dataclass(frozen=True)
class History:
    """Ranks and decisions over time.

    Attributes:
        ranks: ``(step, ranks)`` by rising step; a target that an entry leaves out has rank 0.
        decisions: By rising step.
        costs: Parameters of one rank (``d_in + d_out``) by target, where the plan tells its shape.
        budget: The plan's budget, or None.
    """

    ranks: tuple[tuple[int, Mapping[str, int]], ...]
    decisions: tuple[Decision, ...]
    costs: Mapping[str, int]
    budget: int | None

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
                for values in (decision.effective_rank, decision.smoothed, decision.energy)
                for name in values
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
            computed = Recount(self.cost_of(ranks), self.cost_of(grown), len(change))
        return Event(
            step=told.step,
            parameters=_first(told.parameters, computed.parameters),
            budget=_first(told.budget, self.budget),
            moved=_first(told.moved, computed.moved),
            changed=_first(told.changed, computed.changed),
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


@dataclass(frozen=True, slots=True)
class Event:
    """One decision or change of ranks: as told, else as counted from the ranks.

    ``recount`` always holds the latter, so that a record that contradicts itself is noticed;
    ``decision`` is what the record tells, empty for a change of ranks without a decision.
    """

    step: int
    parameters: int | None
    budget: int | None
    moved: int | None
    changed: int | None
    decision: Decision
    recount: Recount


def read_history(record: RunRecord, costs: Mapping[str, int], budget: int | None) -> History | None:
    """Read what a record tells of ranks and decisions over time.

    Args:
        record: The record, untrusted.
        costs: Parameters of one rank by target.
        budget: The plan's budget.

    Returns:
        The history; None without decisions and with fewer than two entries of ranks.
    """
    ranks: dict[int, dict[str, int]] = {}
    for entry in _entries(record.ranks_over_time):
        if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], Mapping):
            step = as_count(entry[0])
            if step is not None:
                ranks[step] = _named(entry[1], as_count)
    decisions: dict[int, Decision] = {}
    for entry in _entries(record.decisions):
        if isinstance(entry, Mapping) and (step := as_count(entry.get("step"))) is not None:
            decisions[step] = _decision(step, entry)
    if len(ranks) < 2 and not decisions:
        return None
    ordered = tuple(decisions[step] for step in sorted(decisions))
    return History(tuple(sorted(ranks.items())), ordered, costs, budget)


def _decision(step: int, entry: Mapping[str, Any]) -> Decision:
    seconds = as_float(entry.get("seconds"))
    return Decision(
        step=step,
        parameters=as_count(entry.get("parameters")),
        budget=as_count(entry.get("budget")),
        moved=as_count(entry.get("moved")),
        changed=as_count(entry.get("changed")),
        seconds=None if seconds is None else max(seconds, 0.0),
        effective_rank=_named(entry.get("effective_rank"), as_float),
        smoothed=_named(entry.get("smoothed"), as_float),
        energy=_named(entry.get("energy"), as_float),
    )


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _named(value: Any, read: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    found = {clean(name): read(item) for name, item in value.items()}
    return {name: item for name, item in found.items() if item is not None}


def _first(told: int | None, computed: int | None) -> int | None:
    return computed if told is None else told
