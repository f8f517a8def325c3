"""Neurons in a record that was read from a file: what may be wrong with them."""

import re
from collections.abc import Mapping
from typing import Any

from gradrank.core.errors import PlanError
from gradrank.core.partition import NeuronPartition
from gradrank.record.checks import is_count, is_number, shown

# A map is a picture, not the gradient: more cells than this only make files large.
MOST_CELLS = 128
_COUNTS = ("step", "looks", "interval")
_HEX = re.compile(r"[0-9a-fA-F]+")


def neurons_fault(neurons: Mapping[str, Any]) -> str:
    """Say what is wrong with a record's neurons; what a later version adds is let through.

    Args:
        neurons: The field, untrusted.

    Returns:
        The fault, or "".
    """
    for key in _COUNTS:
        if not is_count(neurons.get(key)):
            return f"'{key}' must be a whole number of at least 0, and is {shown(neurons[key])}"
    if not isinstance(neurons.get("rule", ""), str):
        return f"'rule' must be text, and is {shown(neurons['rule'])}"
    return _each("targets", neurons, _target_fault) or _each("maps", neurons, _map_fault)


def _each(key: str, neurons: Mapping[str, Any], fault: Any) -> str:
    entries = neurons.get(key, {})
    if not isinstance(entries, dict):
        return f"'{key}' must be an object by target, and is {shown(entries)}"
    found = ((name, fault(entry)) for name, entry in entries.items())
    return next((f"'{key}' of {shown(name)}: {text}" for name, text in found if text), "")


def _target_fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"it must be an object, and is {shown(entry)}"
    rows, text = entry.get("d_out"), entry.get("dominant")
    if not is_count(rows) or not rows:
        return f"'d_out' must be a whole number of at least 1, and is {shown(rows)}"
    # Before the number is read: reading takes time and memory that a hostile length would choose.
    if not isinstance(text, str) or len(text) > rows // 4 + 1 or not _HEX.fullmatch(text):
        return (
            f"'dominant' must be a hexadecimal number of at most {rows // 4 + 1} digits, and is "
            f"{shown(text)}"
        )
    try:
        split = NeuronPartition.from_dict(entry)
    except PlanError as error:
        return str(error).rstrip(".")
    told = entry.get("dominant_rows", split.dominant_rows)
    if told != split.dominant_rows or isinstance(told, bool):
        return f"'dominant_rows' is {shown(told)}, but 'dominant' holds {split.dominant_rows} rows"
    return _hits_fault(entry, rows)


def _hits_fault(entry: Mapping[str, Any], rows: int) -> str:
    looks, hits = entry.get("looks"), entry.get("hits", [])
    if not is_count(looks):
        return f"'looks' must be a whole number of at least 0, and is {shown(looks)}"
    if not isinstance(hits, list) or not all(is_count(h) and h is not None for h in hits):
        return f"'hits' must be a list of whole numbers of at least 0, and is {shown(hits)}"
    if not hits:
        return ""
    if looks is None or len(hits) != looks + 1:
        return f"'hits' must have one entry more than looks ({shown(looks)}), and has {len(hits)}"
    if sum(hits) != rows:
        return f"'hits' must sum to d_out = {rows}, and sums to {sum(hits)}"
    return ""


def _map_fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"it must be an object, and is {shown(entry)}"
    for key in ("rows", "columns"):
        if not is_count(entry.get(key)) or not entry.get(key):
            return f"'{key}' must be a whole number of at least 1, and is {shown(entry.get(key))}"
    faults = (_cells_fault(key, entry) for key in ("before", "after"))
    return next((fault for fault in faults if fault), "")


def _cells_fault(key: str, entry: Mapping[str, Any]) -> str:
    cells = entry.get(key)
    if cells is None:
        return ""
    if not isinstance(cells, list) or not all(isinstance(row, list) for row in cells):
        return f"'{key}' must be a list of rows, and is {shown(cells)}"
    most = min(MOST_CELLS, entry["rows"]), min(MOST_CELLS, entry["columns"])
    widths = {len(row) for row in cells}
    if not 1 <= len(cells) <= most[0] or len(widths) != 1 or not 1 <= max(widths) <= most[1]:
        size = f"{len(cells)} rows of {min(widths, default=0)} to {max(widths, default=0)}"
        return f"'{key}' must be at most {most[0]} rows of {most[1]} cells, and is {size}"
    wrong = next((v for row in cells for v in row if not is_number(v) or (v or 0) < 0), None)
    if wrong is not None:
        return f"'{key}' must hold finite numbers of at least 0, and holds {shown(wrong)}"
    return ""
