"""Ranks and decisions over time, read with care: entries may be missing, wrong or hostile."""

from collections.abc import Mapping
from typing import Any

from gradrank.record import RunRecord
from gradrank.report.history import Decision, History
from gradrank.report.text import as_count, as_float, clean


def read_history(
    record: RunRecord,
    costs: Mapping[str, int],
    budget: int | None,
    tolerance: float | None = None,
) -> History | None:
    """Read what a record tells of ranks and decisions over time.

    Args:
        record: The record, untrusted.
        costs: Parameters of one rank by target.
        budget: The plan's budget.
        tolerance: Of the completeness gap, if the method has one.

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
    bound = tolerance if tolerance is not None and tolerance > 0 else None
    return History(tuple(sorted(ranks.items())), ordered, costs, budget, bound)


def _decision(step: int, entry: Mapping[str, Any]) -> Decision:
    seconds, passes, gap = (as_float(entry.get(key)) for key in ("seconds", "passes", "gap"))
    return Decision(
        step=step,
        parameters=as_count(entry.get("parameters")),
        budget=as_count(entry.get("budget")),
        moved=as_count(entry.get("moved")),
        changed=as_count(entry.get("changed")),
        seconds=_least_zero(seconds),
        effective_rank=_named(entry.get("effective_rank"), as_float),
        smoothed=_named(entry.get("smoothed"), as_float),
        energy=_named(entry.get("energy"), as_float),
        importance=_named(entry.get("importance"), as_float),
        passes=_least_zero(passes),
        attributed=as_float(entry.get("attributed")),
        loss_change=as_float(entry.get("loss_change")),
        gap=_least_zero(gap),
    )


def _least_zero(value: float | None) -> float | None:
    return None if value is None else max(value, 0.0)


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _named(value: Any, read: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    found = {clean(name): read(item) for name, item in value.items()}
    return {name: item for name, item in found.items() if item is not None}
