"""Which records a comparison stands on, and which go into nothing, by name and reason."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gradrank.core.errors import GradrankError
from gradrank.evidence.findings import Excluded, Failure, Outcome, Tuned
from gradrank.evidence.items import Items
from gradrank.evidence.runs import Run, name_of, read_outcome, read_run, read_tuned
from gradrank.record.run import RunRecord

T = TypeVar("T")


@dataclass
class Sorted:
    """Records by what they are good for.

    Attributes:
        name: Name of the recipe.
        about: What it asks.
        source: Paper and table or figure.
        metrics: The metric that counts, per task.
        finals: Runs of the reported phase, failed ones included.
        outcomes: Finished runs of the reported phase, by place, with items as arrays.
        tuned: Runs of the search for learning rates.
        allocations: Runs of the phase ``stability``.
        failures: Runs that failed or diverged.
        excluded: Records that went into nothing.
    """

    name: str = ""
    about: str = ""
    source: str = ""
    metrics: dict[str, str] = field(default_factory=dict)
    finals: list[Run] = field(default_factory=list)
    outcomes: list[tuple[Outcome, Items]] = field(default_factory=list)
    tuned: list[Tuned] = field(default_factory=list)
    allocations: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)


def sort_out(records: Iterable[RunRecord], reference: str) -> Sorted:
    """Sort records by what they are good for; their order makes no difference.

    Left out are records of no comparison, of another recipe than most, interrupted, ambiguous
    (two for the same run of the same seed), with another metric or other items than most runs of
    their task, and those that contradict themselves. Runs that failed or diverged are failures.

    Args:
        records: The records.
        reference: Label of the arm whose items decide where runs tie.

    Returns:
        The sorted records.
    """
    found = Sorted()
    runs = _one_recipe(_readable(records, found), found)
    runs = _unambiguous(_ended(runs, found), found)
    runs = _one_metric(runs, found)
    for run in runs:
        _READERS[run.phase](run, found)
    _same_items(found, reference)
    return found


def _readable(records: Iterable[RunRecord], found: Sorted) -> list[Run]:
    runs: list[Run] = []
    for record in records:
        try:
            runs.append(read_run(record))
        except GradrankError as error:
            found.excluded.append(Excluded(name_of(record), str(error)))
    return sorted(runs, key=lambda run: (run.run_id, str(run.place)))


def _leave(found: Sorted, run: Run, reason: str) -> None:
    found.excluded.append(Excluded(run.run_id, reason))


def _most(values: Iterable[T], key: Callable[[T], str] = str) -> T:
    """Return the most frequent value; of several the first by its text."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], key(value)))


def _one_recipe(runs: Sequence[Run], found: Sorted) -> list[Run]:
    if not runs:
        return []
    found.name = _most(run.recipe for run in runs)
    kept = [run for run in runs if run.recipe == found.name]
    for run in runs:
        if run.recipe != found.name:
            _leave(found, run, f"of the recipe '{run.recipe}', not of '{found.name}'")
    for name in ("about", "source"):
        said = _most(str((run.record.comparison or {}).get(name) or "") for run in kept)
        setattr(found, name, said)
    return kept


def _ended(runs: Sequence[Run], found: Sorted) -> list[Run]:
    for run in runs:
        if run.record.status == "interrupted":
            _leave(found, run, "interrupted: it has not finished")
    return [run for run in runs if run.record.status != "interrupted"]


def _unambiguous(runs: Sequence[Run], found: Sorted) -> list[Run]:
    by_place: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        by_place[run.place].append(run)
    kept: list[Run] = []
    for rivals in by_place.values():
        if all(run.record == rivals[0].record for run in rivals):
            kept.append(rivals[0])
            for run in rivals[1:]:
                _leave(found, run, "a copy of another record")
            continue
        for run in rivals:
            _leave(
                found,
                run,
                f"one of {len(rivals)} different records of {run.method} on {run.task} at "
                f"{run.budget} with seed {run.seed}: it is not known which one counts",
            )
    return kept


def _one_metric(runs: Sequence[Run], found: Sorted) -> list[Run]:
    measured: dict[str, list[str]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        if run.metric is not None:
            (measured if _has_values(run) else others)[run.task].append(run.metric)
    named = {**others, **measured}
    found.metrics = {task: _most(names) for task, names in sorted(named.items())}
    kept: list[Run] = []
    for run in runs:
        wanted = found.metrics.get(run.task)
        if run.metric in {None, wanted} or not _has_values(run):
            kept.append(run)
        else:
            _leave(found, run, f"counts {run.metric}; the other runs of {run.task}: {wanted}")
    return kept


def _has_values(run: Run) -> bool:
    """Say whether a run measured anything: what failed or only allocated fits every metric."""
    return run.phase != "stability" and run.record.status != "failed"


def _final(run: Run, found: Sorted) -> None:
    if run.record.status == "failed":
        found.finals.append(run)
        found.failures.append(Failure(run.run_id, run.message))
        return
    try:
        outcome = read_outcome(run)
    except ArithmeticError as error:
        found.finals.append(run)
        found.failures.append(Failure(run.run_id, str(error)))
    except GradrankError as error:
        _leave(found, run, str(error))
    else:
        found.finals.append(run)
        found.outcomes.append(outcome)


def _tune(run: Run, found: Sorted) -> None:
    if run.lr is None:
        _leave(found, run, "it does not say which learning rate it tries")
        return
    value, message = None, run.message
    if run.record.status != "failed":
        try:
            value = read_tuned(run)
        except ArithmeticError as error:
            message = str(error)
        except GradrankError as error:
            _leave(found, run, str(error))
            return
    if value is None:
        found.failures.append(Failure(run.run_id, message))
    found.tuned.append(Tuned(*run.cell, lr=run.lr, seed=run.seed, value=value))


def _stability(run: Run, found: Sorted) -> None:
    if run.record.status == "failed":
        found.failures.append(Failure(run.run_id, run.message))
    else:
        found.allocations.append(run)


_READERS = {"final": _final, "tune": _tune, "stability": _stability}


def _same_items(found: Sorted, reference: str) -> None:
    """Leave out runs that were evaluated on other items than most runs of their task."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    own: dict[str, Counter[str]] = defaultdict(Counter)
    sizes = {items.fingerprint: items.size for _, items in found.outcomes}
    for outcome, items in found.outcomes:
        votes[outcome.task][items.fingerprint] += 1
        own[outcome.task][items.fingerprint] += outcome.method == reference
    kept: list[tuple[Outcome, Items]] = []
    for outcome, items in found.outcomes:
        right = _elected(votes[outcome.task], own[outcome.task])
        if items.fingerprint == right:
            kept.append((outcome, items))
            continue
        reason = (
            f"evaluated on {items.size} items, the other runs of {outcome.task} on {sizes[right]}"
            if items.size != sizes[right]
            else f"evaluated on other items than the other runs of {outcome.task}"
        )
        found.excluded.append(Excluded(outcome.run_id, reason))
        place = outcome.task, outcome.budget, outcome.method, outcome.seed
        found.finals = [run for run in found.finals if (*run.cell, run.seed) != place]
    found.outcomes = kept


def _elected(votes: Counter[str], own: Counter[str]) -> str:
    return min(votes, key=lambda mark: (-votes[mark], -own[mark], mark))
