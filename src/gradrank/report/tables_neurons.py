"""Tables on neuron partitions: every target's rows and ranks, and every pair of runs."""

from collections.abc import Mapping, Sequence

from gradrank.core.partition import NeuronPartition
from gradrank.report.blocks import Cell, Table, num
from gradrank.report.layout import Layout
from gradrank.report.overlap import Overlap
from gradrank.report.pairs import Pair
from gradrank.report.text import NOTHING, count, number, percent
from gradrank.report.view import Run

MAX_RUNS = 6
MAX_TYPES = 8
# A longer table of pairs starts folded.
SHORT = 12


def partition_table(runs: Mapping[str, Run], layout: Layout) -> Table | None:
    """Return every target with its rows and ranks: ``dominant × r + rest × r'``.

    Args:
        runs: The runs with partitions, by label.
        layout: Gives layers and module types.

    Returns:
        The table, folded; None without partitions. The first ``MAX_RUNS`` runs are in it.
    """
    shown = dict(list(runs.items())[:MAX_RUNS])
    names = [n for n in layout.places if any(n in run.splits for run in shown.values())]
    if not names:
        return None
    several = len(shown) > 1
    head = [Cell("target"), num("layer"), Cell("type"), num("neurons")]
    for label in shown:
        whose = f", {label}" if several else ""
        head += [num(f"dominant{whose}"), num(f"rows × rank{whose}"), num(f"parameters{whose}")]
    rows = [_row(name, shown, layout) for name in names]
    caption = f"Rows and ranks of {count(len(rows))} split targets"
    if len(runs) > len(shown):
        caption += f", first {count(MAX_RUNS)} runs"
    return Table("partitions", caption, head, rows, interactive=True)


def capacity(split: NeuronPartition) -> str:
    """Write a partition as rows and ranks.

    Args:
        split: The partition.

    Returns:
        Text such as ``192 × 16 + 384 × 2``; groups without an adapter are left out.

    Examples:
        >>> capacity(NeuronPartition.of([True, False, False], 16, 2))
        '1 × 16 + 2 × 2'
    """
    sizes = split.dominant_rows, split.d_out - split.dominant_rows
    groups = [
        f"{count(size)} × {rank}" for size, rank in zip(sizes, split.ranks, strict=True) if rank
    ]
    return " + ".join(groups) or "no adapter"


def overlap_table(pairs: Sequence[Pair]) -> Table:
    """Return the overlap of every pair of runs, with its chance level.

    Args:
        pairs: The overlaps.

    Returns:
        The table, folded if it is long.
    """
    types = list(dict.fromkeys(row for pair in pairs for row in pair.types))[:MAX_TYPES]
    types = types if len(types) > 1 else []
    head = [Cell("runs"), num("Jaccard"), num("by chance"), num("difference")]
    head += [num("shared neurons"), num("expected"), num("standard deviations from chance")]
    head += [Cell("verdict"), *(num(f"{row} (by chance)") for row in types)]
    rows = []
    for pair in pairs:
        found = pair.whole
        rows.append(
            [
                Cell(f"{pair.first} and {pair.second}", f"{pair.first} {pair.second}"),
                _percent(found.jaccard),
                _percent(found.chance),
                _difference(found),
                num(count(found.shared), found.shared),
                num(count(found.expected), found.expected),
                _deviations(found.z),
                Cell(found.verdict, found.verdict),
                *(_of_type(pair.types.get(row)) for row in types),
            ]
        )
    caption = "Overlap of dominant neurons, one row per pair of runs."
    return Table("overlaps", caption, head, rows, len(rows) > SHORT, hint="run or verdict")


def _row(name: str, runs: Mapping[str, Run], layout: Layout) -> list[Cell]:
    depth = layout.columns[layout.places[name][0]][1]
    kind = layout.row_of(name)
    sizes = {run.splits[name].d_out for run in runs.values() if name in run.splits}
    row = [Cell(name, name), num(NOTHING if depth is None else str(depth), depth), Cell(kind, kind)]
    row.append(num(" or ".join(count(size) for size in sorted(sizes)), max(sizes)))
    for run in runs.values():
        entry = run.planned.get(name)
        if entry is None or entry.split is None:
            plain = num(NOTHING) if entry is None else num(f"all × {entry.rank}", entry.rank)
            row += [num(NOTHING), plain, _parameters(entry.parameters if entry else 0)]
            continue
        split = entry.split
        share = split.dominant_rows / split.d_out
        row += [num(percent(share), share), num(capacity(split), split.dominant_rows)]
        row.append(_parameters(entry.parameters if entry.shaped else 0))
    return row


def _parameters(value: int) -> Cell:
    return num(count(value), value) if value else num(NOTHING)


def _percent(value: float | None) -> Cell:
    return num(percent(value), value)


def _difference(found: Overlap) -> Cell:
    if found.jaccard is None or found.chance is None:
        return num(NOTHING)
    value = found.jaccard - found.chance
    return num(f"{100 * value:+.1f} points".replace("-", "−"), value)


def _deviations(z: float | None) -> Cell:
    return num(NOTHING) if z is None else num(f"{'+' if z > 0 else ''}{number(z, 3)}", z)


def _of_type(found: Overlap | None) -> Cell:
    if found is None or found.jaccard is None:
        return num(NOTHING)
    return num(f"{percent(found.jaccard)} ({percent(found.chance)})", found.jaccard)
