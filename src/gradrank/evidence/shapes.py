"""Ranks and parameters per target that a record tells of."""

from collections.abc import Mapping
from typing import Any

from gradrank.record.run import RunRecord


def ranks_of(record: RunRecord, entry: int) -> dict[str, int]:
    """Return the ranks of a record at the start (0) or at the end (-1).

    Args:
        record: The record.
        entry: Which entry of ``ranks_over_time``.

    Returns:
        Rank per target; those of the plan where no ranks were recorded; empty where there is none.
    """
    over_time = record.ranks_over_time
    last = over_time[entry] if over_time else None
    if isinstance(last, list) and len(last) == 2 and isinstance(last[1], Mapping):
        return {str(k): v for k, v in last[1].items() if is_whole(v)}
    return _of_plan(record, "rank")


def parameters_of(record: RunRecord) -> dict[str, int]:
    """Return the parameters per target of a record's plan.

    Args:
        record: The record.

    Returns:
        Parameters per target; empty without a plan.
    """
    return _of_plan(record, "parameters")


def _of_plan(record: RunRecord, name: str) -> dict[str, int]:
    targets = (record.plan or {}).get("targets")
    if not isinstance(targets, Mapping):
        return {}
    return {
        str(target): entry[name]
        for target, entry in targets.items()
        if isinstance(entry, Mapping) and is_whole(entry.get(name))
    }


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, 0 or more.

    Args:
        value: Anything that a record may hold.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
