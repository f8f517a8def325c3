"""Decisions in a record that was read from a file: what may be wrong with one."""

from typing import Any

from gradrank.record.checks import is_count, is_number, shown

_DECISION_COUNTS = ("step", "parameters", "budget", "moved", "changed")
_DECISION_MAPS = ("effective_rank", "smoothed", "energy", "importance")
_DECISION_NUMBERS = ("seconds", "passes", "attributed", "loss_change", "gap")
_NEVER_NEGATIVE = ("passes", "gap")


def decision_fault(entry: Any) -> str:
    """Say what is wrong with a decision; what a later version adds to it is let through.

    Args:
        entry: One entry of a record's ``decisions``, untrusted.

    Returns:
        The fault, or "".
    """
    if not isinstance(entry, dict) or entry.get("step") is None:
        return f"it must be an object with a step, and is {shown(entry)}"
    for key in _DECISION_COUNTS:
        if not is_count(entry.get(key)):
            return f"'{key}' must be a whole number of at least 0, and is {shown(entry[key])}"
    for key in _DECISION_NUMBERS:
        value = entry.get(key)
        if not is_number(value) or (key in _NEVER_NEGATIVE and value is not None and value < 0):
            least = " of at least 0" if key in _NEVER_NEGATIVE else ""
            return f"'{key}' must be a finite number{least}, and is {shown(value)}"
    return next((bad for key in _DECISION_MAPS if (bad := _column_fault(key, entry))), "")


def _column_fault(key: str, entry: dict[str, Any]) -> str:
    column = entry.get(key, {})
    if not isinstance(column, dict):
        return f"'{key}' must be an object of numbers by target, and is {shown(column)}"
    for name, value in column.items():
        if not is_number(value):
            return f"'{key}' of {shown(name)} must be a finite number, and is {shown(value)}"
    return ""
