"""Rehearse a recipe on the models' shapes: no weights, no data, seconds instead of a night."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradrank.core.errors import GradrankError, OptionError
from gradrank.core.targets import cost_of_rank_one
from gradrank.lab.arms import shared_scale
from gradrank.lab.compare.config import RunConfig
from gradrank.lab.compare.dry_arms import (
    Footprint,
    Question,
    footprint,
    measures,
    resolved,
)
from gradrank.lab.compare.dry_models import Outline, outline
from gradrank.lab.compare.dry_tasks import Length, TaskOutline, length, task_outline
from gradrank.lab.compare.dry_text import recipe_lines
from gradrank.lab.compare.grid import FINAL, STABILITY, TUNE
from gradrank.lab.compare.recipe import Recipe, TaskEntry, Variant
from gradrank.lab.epochs import options_in_steps
from gradrank.lab.recipes import read

# Stands in for a training set of unknown size, where a length in epochs is only to be legal.
_UNKNOWN_SIZE = 100_000


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: a task, a method and a budget.

    Attributes:
        task: Label of the task.
        method: Label of the method.
        budget: As in the recipe.
        parameters: The budget in parameters.
        model: What it fine-tunes.
        data: Its data.
        length: How long each of its runs is.
        footprint: What it would train.
        trials: Learning rates that are searched for it.
        measures: Whether its ranks follow from a calibration.
    """

    task: str
    method: str
    budget: str
    parameters: int
    model: Outline
    data: TaskOutline
    length: Length
    footprint: Footprint
    trials: int
    measures: bool


@dataclass(frozen=True)
class Rehearsal:
    """What a recipe would run.

    Attributes:
        recipe: The recipe.
        cells: Every cell, in the order of the grid.
        runs: Number of runs by phase.
        steps: Optimizer steps of all runs that train; None where some follow from data.
        tokens: Tokens of all runs that train, at most; None without text or where unknown.
    """

    recipe: Recipe
    cells: tuple[Cell, ...]
    runs: Mapping[str, int]
    steps: int | None
    tokens: int | None

    def lines(self) -> list[str]:
        """Return the rehearsal as a table for a terminal."""
        return recipe_lines(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the rehearsal as plain data."""
        models = {cell.model.name: cell.model for cell in self.cells}
        return {
            "recipe": self.recipe.name,
            "runs": dict(self.runs),
            "steps": self.steps,
            "tokens": self.tokens,
            "models": [
                {
                    "name": name,
                    "class": found.kind,
                    "shapes": found.source,
                    "parameters": found.base_parameters,
                    "targets": len(found.targets),
                    "rank_one": cost_of_rank_one(found.targets),
                }
                for name, found in models.items()
            ],
            "cells": [
                {
                    "task": cell.task,
                    "method": cell.method,
                    "budget": cell.budget,
                    "budget_parameters": cell.parameters,
                    "model": cell.model.name,
                    "head_parameters": cell.model.head_parameters,
                    **asdict(cell.length),
                    **asdict(cell.footprint),
                }
                for cell in self.cells
            ],
        }


def rehearsal(path: Path) -> Rehearsal:
    """Check a recipe on shapes.

    Args:
        path: The recipe.

    Returns:
        What it would run.

    Raises:
        OptionError: Naming every problem, and the cells that have it.
    """
    recipe = read(path)
    problems = _Problems()
    found: list[Cell] = []
    for task, variant, budget in recipe.cells():
        try:
            found.append(_cell(recipe, task, variant, budget))
        except GradrankError as error:
            problems.add(str(error), f"{task.label} · {variant.label} · {budget}")
    if problems.where:
        raise OptionError(problems.told(f"recipe '{path.name}'"))
    steps, tokens = (_total(recipe, found, unit) for unit in ("steps", "tokens"))
    return Rehearsal(recipe, tuple(found), _runs(recipe, found), steps, tokens)


class _Problems:
    """Problems, and the cells that have each."""

    def __init__(self) -> None:
        self.where: dict[str, list[str]] = {}

    def add(self, message: str, where: str) -> None:
        self.where.setdefault(message, []).append(where)

    def told(self, what: str) -> str:
        """Return all of them in one message."""
        many = f"{len(self.where)} problem" + ("s" if len(self.where) > 1 else "")
        lines = [f"{what} cannot run as it is: {many}."]
        for number, (message, cells_) in enumerate(self.where.items(), start=1):
            more = f" and {len(cells_) - 3} more" if len(cells_) > 3 else ""
            lines.append(f"{number}. {'; '.join(cells_[:3])}{more}: {message}")
        return "\n".join(lines)


def _cell(recipe: Recipe, task: TaskEntry, variant: Variant, budget: str) -> Cell:
    config = recipe.config(task, variant)
    data = task_outline(config)
    model = outline(config.model, data.head, data.classes, config.targets)
    long = length(config, data, model.max_length)
    parameters = resolved(budget, model.targets, model.base_parameters)
    # Asked for every arm: the reference and the others share one scale or none of them runs.
    shared_scale(model.targets, budget, model.base_parameters, config.scaling, config.lora_alpha)
    question = Question(
        model=config.model,
        head=data.head,
        targets=config.targets,
        method=variant.method,
        options=_options(variant, config, long),
        budget=budget,
        parameters=parameters,
        steps=long.steps,
        scaling=config.scaling,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
    )
    return Cell(
        task=task.label,
        method=variant.label,
        budget=budget,
        parameters=parameters,
        model=model,
        data=data,
        length=long,
        footprint=footprint(question),
        trials=len(recipe.rates_of(task, variant, budget)),
        measures=measures(question),
    )


def _options(variant: Variant, config: RunConfig, long: Length) -> tuple[tuple[str, str], ...]:
    examples = long.examples or _UNKNOWN_SIZE
    step = config.batch_size * config.accumulate
    found = options_in_steps(variant.options, examples, step)
    return tuple((key, str(value)) for key, value in found.items())


def _runs(recipe: Recipe, found: list[Cell]) -> dict[str, int]:
    """Return the number of runs by phase, without listing them."""
    trials = sum(cell.trials for cell in found)
    return {
        TUNE: trials * len(recipe.tuning_seeds),
        FINAL: len(found) * len(recipe.seeds),
        STABILITY: sum(cell.measures for cell in found) * len(recipe.calibration_seeds),
    }


def _total(recipe: Recipe, found: list[Cell], unit: str) -> int | None:
    """Return the steps or tokens of all runs that train; None where some are unknown."""
    total = 0
    for cell in found:
        each = getattr(cell.length, unit)
        if each is None:
            return None
        total += each * (len(recipe.seeds) + cell.trials * len(recipe.tuning_seeds))
    return total
