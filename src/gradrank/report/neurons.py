"""What a report knows of neurons: hits, gradient maps, and masks as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradrank.core.errors import PlanError
from gradrank.core.partition import NeuronPartition
from gradrank.record import RunRecord
from gradrank.report.text import as_count, as_float, clean

# A histogram of more looks than this is no histogram of a real run.
_MOST_LOOKS = 100_000
_MOST_CELLS = 128


@dataclass(frozen=True)
class GradientMap:
    """Magnitudes of a target's approximate gradient, averaged into cells.

    Attributes:
        rows: Output rows of the target, ``d_out``.
        columns: Input features of the target, ``d_in``.
        looks: One array ``[cells down, cells across]`` by name: ``first look``, ``last look``.
    """

    rows: int
    columns: int
    looks: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Neurons:
    """How a method of two stages chose the dominant neurons; None or empty where it is not told.

    Attributes:
        step: After which the rows were split.
        looks: Looks at gradients before it.
        interval: Steps between looks.
        rule: How dominant neurons were chosen, or "".
        hits: Per target, how many neurons were important in k looks, for k from 0 to all of them.
        maps: Per target, the gradient before and after.
    """

    step: int | None = None
    looks: int | None = None
    interval: int | None = None
    rule: str = ""
    hits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    maps: Mapping[str, GradientMap] = field(default_factory=dict)


def read_neurons(record: RunRecord) -> tuple[Neurons | None, dict[str, NeuronPartition]]:
    """Read a record's neurons.

    Args:
        record: The record, untrusted.

    Returns:
        What is known of the choice, None if nothing is, and the partition of each target.
    """
    data = _mapping(record.neurons)
    splits, hits = {}, {}
    for key, entry in _mapping(data.get("targets")).items():
        name, split = clean(key), read_partition(entry)
        if split is not None:
            splits[name] = split
            hits[name] = _hits(_mapping(entry).get("hits"), split.d_out)
    found = {clean(key): _map(entry) for key, entry in _mapping(data.get("maps")).items()}
    neurons = Neurons(
        step=as_count(data.get("step")),
        looks=as_count(data.get("looks")),
        interval=as_count(data.get("interval")),
        rule=clean(data.get("rule") or "", 40),
        hits={name: counts for name, counts in hits.items() if counts},
        maps={name: each for name, each in found.items() if each is not None},
    )
    return (neurons if splits or neurons.maps else None), splits


def read_partition(entry: Any) -> NeuronPartition | None:
    """Read one partition.

    Args:
        entry: Plain data, untrusted.

    Returns:
        The partition, or None if it is malformed.
    """
    try:
        return NeuronPartition.from_dict(entry)
    except PlanError:
        return None


def mask(split: NeuronPartition) -> np.ndarray:
    """Return which rows are dominant.

    Args:
        split: The partition.

    Returns:
        ``[d_out]``, 1 for dominant rows and 0 for the others.
    """
    raw = np.frombuffer(split.bits.to_bytes(-(-split.d_out // 8), "little"), np.uint8)
    return np.unpackbits(raw, count=split.d_out, bitorder="little")


def shares(split: NeuronPartition, cells: int) -> np.ndarray:
    """Return the share of dominant rows in stretches of neighbouring rows.

    Args:
        split: The partition.
        cells: How many stretches; at most one per row is made.

    Returns:
        ``[cells]``, each in [0, 1].
    """
    return binned(mask(split).astype(float), cells)


def binned(values: np.ndarray, cells: int) -> np.ndarray:
    """Average the first axis into stretches whose lengths differ by at most one.

    Args:
        values: ``[n, ...]``.
        cells: How many stretches; at most ``n`` are made.

    Returns:
        ``[min(cells, n), ...]``.

    Examples:
        >>> binned(np.array([0.0, 1.0, 1.0, 1.0]), 2).tolist()
        [0.5, 1.0]
    """
    cells = min(cells, len(values))
    edges = np.arange(cells + 1) * len(values) // cells
    sums = np.add.reduceat(values, edges[:-1], axis=0)
    return sums / np.diff(edges).reshape(-1, *[1] * (values.ndim - 1))


def _hits(value: Any, rows: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not 1 < len(value) <= _MOST_LOOKS:
        return ()
    counts = [as_count(item) for item in value]
    known = tuple(c for c in counts if c is not None)
    # A histogram that does not hold every neuron once is no histogram.
    return known if len(known) == len(counts) and sum(known) == rows else ()


def _map(entry: Any) -> GradientMap | None:
    data = _mapping(entry)
    rows, columns = as_count(data.get("rows")), as_count(data.get("columns"))
    looks = {}
    for key, name in (("before", "first look"), ("after", "last look")):
        cells = _cells(data.get(key))
        if cells is not None:
            looks[name] = cells
    return GradientMap(rows, columns, looks) if rows and columns and looks else None


def _cells(value: Any) -> np.ndarray | None:
    """Return cells as an array, NaN where one is unknown; None if it is no table of numbers."""
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_CELLS:
        return None
    widths = {len(row) if isinstance(row, list) else 0 for row in value}
    if len(widths) != 1 or not 1 <= max(widths) <= _MOST_CELLS:
        return None
    read = [[as_float(cell) for cell in row] for row in value]
    cells = np.array([[np.nan if c is None else abs(c) for c in row] for row in read], dtype=float)
    return cells if np.isfinite(cells).any() else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
