"""Runs compared by their partitions: their labels, and the overlap of every pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from gradrank.report.layout import Layout
from gradrank.report.overlap import Overlap, overlap
from gradrank.report.style import label_of
from gradrank.report.text import clean, shorten
from gradrank.report.view import Run

MAX_RUNS = 12
MAX_TYPES = 24


@dataclass(frozen=True)
class Pair:
    """The overlap of two runs: over all targets, and by module type.

    ``same_task`` and ``same_seed`` are None where one of the runs does not tell; ``same_way`` says
    whether both chose neurons by the same method and rule.
    """

    first: str
    second: str
    whole: Overlap
    types: Mapping[str, Overlap]
    same_task: bool | None
    same_seed: bool | None
    same_way: bool


def all_pairs(runs: Mapping[str, Run], layout: Layout) -> list[Pair]:
    """Compare every pair of runs that split some target both.

    Args:
        runs: The runs by label; the first ``MAX_RUNS`` are compared.
        layout: Gives the module types.

    Returns:
        The pairs, in the order of the runs.
    """
    chosen = [(label, run, run.splits) for label, run in list(runs.items())[:MAX_RUNS]]
    pairs = []
    for (label, run, mine), (other_label, other, theirs) in combinations(chosen, 2):
        groups: dict[str, list[str]] = {}
        for name in mine:
            if name in theirs:
                groups.setdefault(layout.row_of(name), []).append(name)
        rows = [row for row in layout.rows if row in groups][:MAX_TYPES]
        types = {row: overlap(mine, theirs, groups[row]) for row in rows}
        whole = overlap(mine, theirs)
        if whole.targets:
            tasks, seeds = (task_of(run), task_of(other)), (run.seed, other.seed)
            same_task = tasks[0] == tasks[1] if all(tasks) else None
            same_seed = seeds[0] == seeds[1] if None not in seeds else None
            same_way = (run.method, _rule(run)) == (other.method, _rule(other))
            pairs.append(Pair(label, other_label, whole, types, same_task, same_seed, same_way))
    return pairs


def labelled(runs: Sequence[Run]) -> dict[str, Run]:
    """Label the runs that have partitions by what tells them apart: name, task, seed, rule.

    Args:
        runs: The runs.

    Returns:
        The runs with partitions by distinct labels, which they carry themselves too.
    """
    split = [run for run in runs if run.splits]
    facts = [(clean(run.record.name, 32), task_of(run), _seed(run), _rule(run)) for run in split]
    varies = [len(set(column)) > 1 for column in zip(*facts, strict=True)]
    result: dict[str, Run] = {}
    for run, told in zip(split, facts, strict=True):
        parts = [text for i, text in enumerate(told) if text and (i == 0 or varies[i])]
        # The name goes where the rest says enough.
        if not varies[0] and len(parts) > 1:
            parts = parts[1:]
        if len(split) == 1 or not parts:
            parts = [run.label]
        named = replace(run, label=shorten(" · ".join(parts), 40))
        if label_of(named) in result:
            named = run
        while label_of(named) in result:
            named = replace(named, label=f"{named.label}#")
        result[label_of(named)] = named
    return result


def task_of(run: Run) -> str:
    """Return the name of the data that a run was trained on.

    Args:
        run: The run.

    Returns:
        The name, or "".
    """
    value = run.fact("task", "data", "dataset")
    if isinstance(value, Mapping):
        value = value.get("name", "")
    return clean(value, 24) if isinstance(value, str) else ""


def _seed(run: Run) -> str:
    return "" if run.seed is None else f"seed {run.seed}"


def _rule(run: Run) -> str:
    return run.neurons.rule if run.neurons else ""
