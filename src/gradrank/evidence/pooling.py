"""Contrasts of a method over all tasks of a budget, in the unit of seeds' standard deviations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gradrank.evidence.bootstrap import Spread, pooled
from gradrank.evidence.findings import Cell, Contrast, Pooled
from gradrank.evidence.significance import judge

Spreads = Mapping[tuple[str, str, str], Spread]
"""By task, budget and method."""


def pool(cells: Sequence[Cell], contrasts: Sequence[Contrast], spreads: Spreads) -> list[Pooled]:
    """Pool the contrasts of each method and budget over tasks.

    Differences of several tasks have several units, so each is divided by its task's standard
    deviation over seeds: the root of the mean variance over seeds of all cells of this task and
    budget that are held to it. (The reference alone would give a scale of few seeds.) The mean is
    about new seeds and new items of these very tasks; other tasks may differ.

    Args:
        cells: All cells.
        contrasts: All contrasts.
        spreads: Mean difference and variance of those that were tested.

    Returns:
        One entry per budget and method with at least two tasks at the budget. It is not tested
        unless the method was tested on all of them: the easier tasks alone would flatter.
    """
    tasks: dict[str, list[str]] = {}
    for cell in cells:
        if cell.task not in tasks.setdefault(cell.budget, []):
            tasks[cell.budget].append(cell.task)
    rows: dict[tuple[str, str], Pooled] = {}
    for first in contrasts:
        budget, key = first.budget, (first.budget, first.method)
        if key not in rows and len(tasks[budget]) > 1:
            found = {t: spreads.get((t, budget, first.method)) for t in tasks[budget]}
            scales = {t: _scale(cells, t, budget) for t in tasks[budget]}
            lost = [c.lost for c in contrasts if (c.budget, c.method) == key]
            rows[key] = replace(
                _row(first, found, scales),
                lost=(sum(ours for ours, _ in lost), sum(theirs for _, theirs in lost)),
            )
    return judge(list(rows.values()))


def _scale(cells: Sequence[Cell], task: str, budget: str) -> float:
    here = [c for c in cells if (c.task, c.budget) == (task, budget) and c.matched]
    parts = [(c.sd**2, len(c.outcomes) - 1) for c in here if c.sd is not None]
    freedom = sum(weight for _, weight in parts)
    return float(np.sqrt(sum(v * w for v, w in parts) / freedom)) if freedom else 0.0


def _row(
    first: Contrast, found: Mapping[str, Spread | None], scales: Mapping[str, float]
) -> Pooled:
    known = {task: spread for task, spread in found.items() if spread is not None}
    missing = [task for task in found if task not in known]
    flat = [task for task in known if scales[task] == 0]
    notes = [f"not tested on {', '.join(missing)}"] if missing else []
    if flat and not missing:
        notes.append(f"no scale on {', '.join(flat)}: no method varies over seeds there")
    blank = Pooled(
        budget=first.budget,
        method=first.method,
        reference=first.reference,
        tasks=tuple(known),
        difference=None,
        low=None,
        high=None,
        p=None,
        p_corrected=None,
        verdict="not tested",
        notes=tuple(notes),
    )
    if notes:
        return blank
    whole = pooled(list(known.values()), [scales[task] for task in known])
    low, high = whole.interval()
    return replace(blank, difference=whole.value, low=low, high=high, p=whole.p_value())
