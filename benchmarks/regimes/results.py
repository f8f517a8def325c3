"""The study of regimes: passes one after the other, and what they say together."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.regimes.measure import START, Case, kept, take
from benchmarks.regimes.readings import (
    BUDGETS,
    MAGNITUDES,
    NORM,
    from_text,
    planned,
    read_pass,
)
from benchmarks.regimes.views import correlation, crossed, explain, mean, variation, within_shapes

from gradrank.core.errors import DataError
from gradrank.core.files import read_json, write_json
from gradrank.core.targets import Target
from gradrank.evidence.stability import rank_agreement, share_in_common
from gradrank.lab.compare.bench import Bench
from gradrank.ops.agreement import spearman

SCHEMA = "gradrank.study-regimes/1"
_ABSENT = "model or data not found"
Found = dict[str, Any]
Row = dict[str, Any]


def collect(
    cases: Sequence[Case],
    out: Path,
    bench: Bench,
    cache: Path,
    minutes: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Found:
    """Measure what the results do not hold yet; they are written after every pass.

    Args:
        cases: What to measure, in this order.
        out: File of the results.
        bench: Loads models and data.
        cache: Folder of measurements.
        minutes: Nothing is measured later than this; measurements in the cache are still read.
        say: Receives a line for each pass.

    Returns:
        The results: ``targets`` by model, ``cases``, ``passes`` by name and seed, and ``missing``
        with a reason for each pass that is not there.
    """
    found: Found = read_json(out, "study") if out.is_file() else {"schema": SCHEMA}
    for key in ("targets", "cases", "passes"):
        found.setdefault(key, {})
    found["missing"] = {}
    started, absent = time.monotonic(), set()
    for case in cases:
        found["cases"][case.name] = case.told()
        for seed in case.seeds:
            key = f"{case.name} seed {seed}"
            if key in found["passes"]:
                continue
            late = minutes is not None and time.monotonic() - started > 60 * minutes
            late = late and not kept(case, seed, cache).is_file()
            gone = (case.model, case.task) in absent
            if late or gone:
                found["missing"][key] = _ABSENT if gone else "not run yet"
                continue
            began = time.monotonic()
            try:
                taken = take(case, seed, bench, cache)
            except DataError as error:
                # The message names folders of this machine, which are nobody's business later.
                absent.add((case.model, case.task))
                found["missing"][key] = _ABSENT
                _say(say, f"skipped {key}: {error}")
                continue
            found["targets"][case.model] = [
                [t.name, t.d_in, t.d_out] for t in taken.measurement.targets
            ]
            found["passes"][key] = read_pass(case, seed, taken)
            write_json(out, found, overwrite=True)
            _say(say, f"{key}: {time.monotonic() - began:.0f} s")
    write_json(out, found, overwrite=True)
    return found


def summarise(found: Found) -> list[Row]:
    """Return what the passes say together: a row per case, view and reading.

    Args:
        found: From :func:`collect`.

    Returns:
        Rows with ``model``, ``task``, ``point``, ``batches``, ``size`` (examples of a mini-batch),
        ``whole`` (whether the view is all that was measured), ``reading``, ``seeds`` and the
        measures, None where they do not exist:

        - ``saturation``, ``cv``, ``split_half``, ``split_half_within``: means over seeds;
        - by budget (``uniform:8`` alone where not ``whole``), ``cv_ranks``, ``differs`` (share of
          targets whose rank is not uniform's),
          ``moved`` (share of the parameters that lie elsewhere than uniform's), ``plans``
          (Spearman's correlation of two seeds' plans), ``changed`` (share of the parameters that
          another seed puts elsewhere) and ``changed_task`` (that another task, with another
          seed, puts elsewhere);
        - Spearman's correlation of scores: ``seeds_all`` between seeds over all targets, and
          within shapes ``seeds_within`` between seeds, ``tasks_within`` with another task and
          ``start_within`` with the start of the same task, both with another seed;
        - ``with_norm``: Spearman's correlation with the gradient norm of the same calibration;
        - ``explained``, ``adjusted``: R² of a fit by module type and depth; ``rest_seeds``,
          ``rest_tasks``: correlation of what that fit leaves, between seeds and between tasks.
    """
    cells: dict[_Key, _Cell] = {}
    for key, by_seed in _scores(found).items():
        entries = found["targets"][found["cases"][key[0]]["model"]]
        # Plans take most of the time; of smaller views one budget says enough.
        budgets = BUDGETS if _is_whole(found["cases"][key[0]], key[1], key[2]) else BUDGETS[-1:]
        cells[key] = _Cell([Target(*entry) for entry in entries], key[3], by_seed, budgets)
    rows = []
    for (case, batches, group, reading), cell in cells.items():
        told = found["cases"][case]
        rows.append(
            {
                **{key: told[key] for key in ("model", "task", "point")},
                "batches": batches,
                "size": group * told["batch_size"],
                "whole": _is_whole(told, batches, group),
                "reading": reading,
                "seeds": len(cell.rows),
                **cell.alone(),
                **cell.between_seeds(),
                "with_norm": cell.agreement(cells.get((case, batches, group, NORM))),
                **cell.between_tasks(
                    _others(found, cells, case, (batches, group, reading), "task")
                ),
                **cell.against_start(
                    _others(found, cells, case, (batches, group, reading), "point")
                ),
            }
        )
    return rows


_Key = tuple[str, int, int, str]


def _others(
    found: Found, cells: Mapping[_Key, "_Cell"], case: str, view: tuple[int, int, str], by: str
) -> list["_Cell"]:
    """Return the same reading of cases that differ in one thing: the task, or being the start."""
    told = found["cases"][case]
    # A task brings its own length of texts; a point its own way to get there.
    free = {"task", "length"} if by == "task" else {"point", "lr"}
    same = {key: value for key, value in told.items() if key not in free}
    return [
        cells[other, *view]
        for other, its in found["cases"].items()
        if its[by] != told[by]
        and (by == "task" or its["point"] == START)
        and {key: value for key, value in its.items() if key not in free} == same
        and (other, *view) in cells
    ]


class _Cell:
    """One reading of one case in one view: scores, plans and fits by seed."""

    def __init__(
        self,
        targets: Sequence[Target],
        reading: str,
        rows: Mapping[int, Row],
        budgets: Sequence[str],
    ) -> None:
        self.targets, self.rows = targets, rows
        self.scores = {seed: from_text(row["scores"]) for seed, row in rows.items()}
        logs = reading in MAGNITUDES and all(min(s) > 0 for s in self.scores.values())
        self.fits = {
            seed: explain(targets, np.log(values).tolist() if logs else values)
            for seed, values in self.scores.items()
        }
        self.rest = {seed: fit.residuals for seed, fit in self.fits.items()}
        self.plans = {
            budget: {seed: planned(row, targets, budget) for seed, row in rows.items()}
            for budget in budgets
        }
        self.spent = {
            budget: {seed: self._spent(plan) for seed, plan in plans.items()}
            for budget, plans in self.plans.items()
        }

    def alone(self) -> Row:
        """Return what each seed says by itself, as means."""
        row: Row = {
            "saturation": mean([row["saturation"] for row in self.rows.values()]),
            "cv": mean([variation(values) for values in self.scores.values()]),
            "split_half": mean([row["split_half"] for row in self.rows.values()]),
            "split_half_within": mean([row["within_shape"] for row in self.rows.values()]),
            "explained": mean([fit.explained for fit in self.fits.values()]),
            "adjusted": mean([fit.adjusted for fit in self.fits.values()]),
            "cv_ranks": {},
            "differs": {},
            "moved": {},
        }
        for budget, plans in self.plans.items():
            rank = int(budget.partition(":")[2])
            ranks = [list(plan.values()) for plan in plans.values()]
            flat = self._spent(dict.fromkeys((t.name for t in self.targets), rank))
            row["cv_ranks"][budget] = mean([variation(r) for r in ranks])
            row["differs"][budget] = mean([sum(x != rank for x in r) / len(r) for r in ranks])
            row["moved"][budget] = mean([_elsewhere(flat, s) for s in self.spent[budget].values()])
        return row

    def between_seeds(self) -> Row:
        """Return how far seeds agree."""
        pairs = list(combinations(self.scores, 2))
        scores = [(self.scores[a], self.scores[b]) for a, b in pairs]
        return {
            "seeds_all": mean([spearman(torch.tensor(a), torch.tensor(b)) for a, b in scores]),
            "seeds_within": mean([within_shapes(self.targets, a, b) for a, b in scores]),
            "rest_seeds": mean([correlation(self.rest[a], self.rest[b]) for a, b in pairs]),
            "plans": {
                budget: mean([rank_agreement(plans[a], plans[b]) for a, b in pairs])
                for budget, plans in self.plans.items()
            },
            "changed": {
                budget: mean([_elsewhere(spent[a], spent[b]) for a, b in pairs])
                for budget, spent in self.spent.items()
            },
        }

    def agreement(self, other: "_Cell | None") -> float | None:
        """Return how far another reading of the same calibrations agrees, over all targets."""
        if other is None:
            return None
        sides = [(self.scores[seed], other.scores[seed]) for seed in self.scores]
        return mean([spearman(torch.tensor(a), torch.tensor(b)) for a, b in sides])

    def between_tasks(self, others: Sequence["_Cell"]) -> Row:
        """Return how far another task agrees, with another seed."""
        pairs = [(other, a, b) for other in others for a, b in crossed(self.scores, other.scores)]
        return {
            "tasks_within": mean([self._within(other, a, b) for other, a, b in pairs]),
            "rest_tasks": mean([correlation(self.rest[a], o.rest[b]) for o, a, b in pairs]),
            "changed_task": {
                budget: mean([_elsewhere(spent[a], o.spent[budget][b]) for o, a, b in pairs])
                for budget, spent in self.spent.items()
            },
        }

    def against_start(self, others: Sequence["_Cell"]) -> Row:
        """Return how far the start of the same task agrees, with another seed."""
        pairs = [(other, a, b) for other in others for a, b in crossed(self.scores, other.scores)]
        return {
            "start_within": mean([self._within(other, a, b) for other, a, b in pairs]),
            "changed_start": {
                budget: mean([_elsewhere(spent[a], o.spent[budget][b]) for o, a, b in pairs])
                for budget, spent in self.spent.items()
            },
        }

    def _within(self, other: "_Cell", a: int, b: int) -> float | None:
        return within_shapes(self.targets, self.scores[a], other.scores[b])

    def _spent(self, ranks: Mapping[str, int]) -> dict[str, int]:
        return {target.name: ranks[target.name] * target.cost for target in self.targets}


def _scores(found: Found) -> dict[_Key, dict[int, Row]]:
    """Return rows of all seeds by case, view and reading."""
    table: dict[_Key, dict[int, Row]] = {}
    for told in found["passes"].values():
        for row in told["rows"]:
            key = (told["case"], row["batches"], row["group"], row["reading"])
            table.setdefault(key, {})[told["seed"]] = row
    return table


def _is_whole(case: Mapping[str, Any], batches: int, group: int) -> bool:
    return (batches, group) == (case["batches"], 1)


def _elsewhere(first: Mapping[str, int], second: Mapping[str, int]) -> float | None:
    share = share_in_common(first, second)
    return None if share is None else 1 - share


def _say(say: Callable[[str], None] | None, text: str) -> None:
    if say is not None:
        say(text)
