"""What speaks against taking a mean or a difference at face value, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gradrank.evidence.findings import Cell, Outcome

if TYPE_CHECKING:
    from gradrank.evidence.cells import Table

# How far the size of an arm may be from the reference's before a reader is told.
_LEAST, _MOST = 0.9, 1.05


def cell_notes(
    outcomes: Sequence[Outcome], runs: int, failed: int, missing: Sequence[int]
) -> tuple[str, ...]:
    """Return what a reader of a mean must know.

    Args:
        outcomes: Finished runs of the cell.
        runs: How many there are, failed ones included.
        failed: How many failed.
        missing: Seeds that other arms have.

    Returns:
        Sentences without a full stop.
    """
    notes: list[str] = []
    if failed:
        notes.append(f"{failed} of {runs} runs failed; the others alone make the mean")
    if missing:
        notes.append(f"no run with seed {', '.join(str(seed) for seed in missing)}")
    if len({outcome.lr for outcome in outcomes}) > 1:
        notes.append("its runs have different learning rates")
    if len(outcomes) == 1:
        notes.append("one seed: no interval")
    notes.extend(dict.fromkeys(note for outcome in outcomes for note in outcome.notes))
    return tuple(notes)


def refusal(table: Table, cell: Cell, reference: Cell | None, pairs: int) -> str:
    """Return why a difference is not tested.

    Args:
        table: The task.
        cell: The method's cell.
        reference: The reference's cell; None if there is none.
        pairs: Seeds that both finished.

    Returns:
        The reason, or an empty text.
    """
    name, allowed = table.reference, table.allowed(cell.budget)
    if not cell.matched:
        return "not held to the budget"
    if reference is None or not reference.outcomes:
        return f"no finished run of {name} at this budget"
    if not reference.matched:
        return f"{name} is not held to the budget"
    final = max((outcome.final for outcome in cell.outcomes), default=0)
    if allowed is not None and final > allowed:
        return f"ends with {final:,} parameters, above the budget of {allowed:,}"
    if pairs == 0:
        return f"no seed that {name} has too" if cell.outcomes else "no finished run"
    return "one pair of runs: no interval" if pairs == 1 else ""


def lost_runs(cell: Cell, reference: Cell | None) -> tuple[int, int]:
    """Count the seeds of which one side's run failed and the other's finished.

    A method that survives on some seeds only is compared where it survived, which flatters it.

    Args:
        cell: The method's cell.
        reference: The reference's cell.

    Returns:
        Seeds that the method lost, and seeds that the reference lost.
    """
    if reference is None:
        return 0, 0
    ours, theirs = ({o.seed for o in side.outcomes} for side in (cell, reference))
    return len((theirs - ours) - set(cell.missing)), len((ours - theirs) - set(reference.missing))


def contrast_notes(table: Table, cell: Cell, reference: Cell | None) -> tuple[str, ...]:
    """Return what speaks against taking a difference at face value.

    Args:
        table: The task.
        cell: The method's cell.
        reference: The reference's cell; None if there is none.

    Returns:
        Sentences without a full stop.
    """
    notes = [*_sizes(table, cell), *_seeds(cell, reference)]
    if any("different learning rates" in note for note in cell.notes):
        notes.append("its runs have different learning rates")
    notes.extend(_rates(table, cell))
    if reference is not None:
        notes.extend(_settings(cell.outcomes, reference.outcomes))
    return tuple(notes)


def _sizes(table: Table, cell: Cell) -> Iterable[str]:
    allowed, held = table.allowed(cell.budget), table.held(cell.budget)
    if not cell.matched or not cell.outcomes:
        return
    finals = [outcome.final for outcome in cell.outcomes]
    peak = max(outcome.peak for outcome in cell.outcomes)
    if allowed is not None and max(finals) <= allowed < peak:
        yield f"has up to {peak:,} parameters on the way, budget {allowed:,}"
    if held is None:
        return
    if min(finals) < _LEAST * held:
        yield f"ends with {min(finals):,} parameters, below 90 % of the reference's {held:,}"
    if max(finals) > _MOST * held:
        more = max(finals) / held - 1
        yield f"ends with {max(finals):,} parameters, {more:.0%} more than the reference's {held:,}"


def _seeds(cell: Cell, reference: Cell | None) -> Iterable[str]:
    if cell.failed or (reference is not None and reference.failed):
        yield "runs failed: the difference is over the seeds that both finished"
    ours, theirs = lost_runs(cell, reference)
    if ours:
        yield "it failed where the reference finished, so it is not called better"
    if theirs:
        yield "the reference failed where it finished, so it is not called worse"
    gaps = sorted({*cell.missing, *(reference.missing if reference is not None else ())})
    if gaps:
        yield f"not both have run with seed {', '.join(str(seed) for seed in gaps)}"


def _rates(table: Table, cell: Cell) -> Iterable[str]:
    tried = [table.tuned.get((cell.budget, m), {}) for m in (cell.method, table.reference)]
    if len(tried[0]) != len(tried[1]):
        yield f"learning rates tried: {len(tried[0])}, for the reference {len(tried[1])}"
    failed = [sum(not worked for worked in rates.values()) for rates in tried]
    if any(failed):
        yield f"learning rates that failed: {failed[0]}, of the reference {failed[1]}"


def _settings(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Iterable[str]:
    names = dict.fromkeys(name for outcome in (*ours, *theirs) for name in outcome.setting)
    for name in names:
        values = [
            sorted({str(outcome.setting[name]) for outcome in side if name in outcome.setting})
            for side in (ours, theirs)
        ]
        if all(values) and values[0] != values[1]:
            yield f"{name}: {', '.join(values[0])}; of the reference {', '.join(values[1])}"
    heads = [sorted({outcome.other for outcome in side}) for side in (ours, theirs)]
    if all(heads) and heads[0] != heads[1]:
        yield (
            f"trains {heads[0][-1]:,} parameters beside the adapter, the reference {heads[1][-1]:,}"
        )
