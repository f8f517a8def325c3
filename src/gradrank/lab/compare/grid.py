"""From a recipe to runs: every run with its complete settings and a name that says what it is."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradrank.lab.baselines.registry import is_baseline
from gradrank.lab.compare.config import RunConfig
from gradrank.lab.compare.recipe import Recipe, TaskEntry, Variant
from gradrank.lab.epochs import options_in_steps
from gradrank.lab.recipes import file_name
from gradrank.methods.registry import create

TUNE, FINAL, STABILITY = "tune", "final", "stability"


@dataclass(frozen=True, slots=True)
class GridRun:
    """One run of a grid.

    Attributes:
        phase: ``tune`` (chooses a learning rate on the validation split), ``final`` (evaluated on
            the reported split) or ``stability`` (allocates only).
        task: Label of the task.
        label: Label of the method.
        method: Name of the method or baseline.
        options: Its options, as text.
        budget: As in the recipe.
        seed: Seed of the run.
        config: Everything else.
    """

    phase: str
    task: str
    label: str
    method: str
    options: Mapping[str, str]
    budget: str
    seed: int
    config: RunConfig

    @property
    def id(self) -> str:
        """The run's folder: what it is, and a checksum of its settings.

        A run whose settings changed has another name, so that no result is ever taken for one of
        other settings.
        """
        words = [file_name(part) for part in (self.task, self.label, self.budget)]
        if self.phase == TUNE:
            words.append(f"lr{self.config.lr:g}")
        text = json.dumps(self.to_dict(), sort_keys=True)
        check = hashlib.sha256(text.encode()).hexdigest()[:8]
        return "--".join([self.phase, *words, f"seed{self.seed}", check])

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain data."""
        data = asdict(self)
        return {**data, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "GridRun":
        """Read a run from plain data.

        Args:
            data: What :meth:`to_dict` returns.

        Returns:
            The run.
        """
        return cls(**{**data, "config": RunConfig(**data["config"])})


def tuning_runs(recipe: Recipe) -> list[GridRun]:
    """Return the runs that choose learning rates.

    Args:
        recipe: The recipe.

    Returns:
        One run per task, method, budget, rate and tuning seed; none where no rate is searched.
    """
    return [
        _run(recipe, TUNE, cell, seed, rate)
        for seed in recipe.tuning_seeds
        for cell in recipe.cells()
        for rate in recipe.rates_of(*cell)
    ]


def final_runs(recipe: Recipe, chosen: Mapping[tuple[str, str, str], float]) -> list[GridRun]:
    """Return the runs that are reported, seeds outermost, so that a part of them is paired.

    Args:
        recipe: The recipe.
        chosen: Learning rate by task, method and budget; a cell without one takes the recipe's.

    Returns:
        One run per task, method, budget and seed.
    """
    return [
        _run(recipe, FINAL, cell, seed, chosen.get((cell[0].label, cell[1].label, cell[2])))
        for seed in recipe.seeds
        for cell in recipe.cells()
    ]


def stability_runs(
    recipe: Recipe, chosen: Mapping[tuple[str, str, str], float] | None = None
) -> list[GridRun]:
    """Return the runs that only allocate, by other calibration data.

    Args:
        recipe: The recipe.
        chosen: As for :func:`final_runs`; where a head is warmed before, at its cell's rate.

    Returns:
        One run per task, measuring method, budget and calibration seed.
    """
    return [
        _run(recipe, STABILITY, cell, seed, _warming_rate(recipe, cell, chosen or {}))
        for seed in recipe.calibration_seeds
        for cell in recipe.cells()
        if _measures(cell[1])
    ]


def _run(
    recipe: Recipe,
    phase: str,
    cell: tuple[TaskEntry, Variant, str],
    seed: int,
    rate: float | None,
) -> GridRun:
    task, variant, budget = cell
    config = recipe.config(task, variant)
    return GridRun(
        phase=phase,
        task=task.label,
        label=variant.label,
        method=variant.method,
        options=variant.options,
        budget=budget,
        seed=seed,
        config=config if rate is None else replace(config, lr=rate),
    )


def _warming_rate(
    recipe: Recipe,
    cell: tuple[TaskEntry, Variant, str],
    chosen: Mapping[tuple[str, str, str], float],
) -> float | None:
    """Return the rate at which the cell's reported runs warm a new head, if they do."""
    task, variant, budget = cell
    if not recipe.config(task, variant).head_steps:
        return None
    return chosen.get((task.label, variant.label, budget))


def _measures(variant: Variant) -> bool:
    if is_baseline(variant.method):
        return False
    return bool(create(variant.method, options_in_steps(variant.options, 1, 1)).signals())
