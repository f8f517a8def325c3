"""A recipe as data: tasks, methods, budgets, rates and seeds, and the settings of each run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradrank.lab.compare.config import RunConfig, flattened, run_config


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates to search.

    Attributes:
        everywhere: Those of every budget that ``at`` does not name.
        at: Those of single budgets, since the best rate moves with the rank.
    """

    everywhere: tuple[float, ...] = ()
    at: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, budget: str) -> tuple[float, ...]:
        """Return the rates that are searched at a budget; none where nothing is said about it.

        Args:
            budget: The budget, as the recipe writes it.
        """
        return self.at.get(budget, self.everywhere)


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a comparison.

    Attributes:
        label: What it is called in tables; unique in the recipe.
        method: Name of a method or a baseline.
        options: Its options.
        run: Settings in which its runs differ from the others'.
        budgets: Budgets it is run at; empty: all of the recipe.
        rates: Learning rates to search, as many as everybody's; where it names none: those of
            the task or the recipe.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """One task of a comparison.

    Attributes:
        label: What it is called in tables; unique in the recipe.
        run: Settings in which its runs differ from the others'.
        budgets: Its budgets; empty: those of the recipe.
        rates: Its learning rates to search; where it names none: those of the recipe.
    """

    label: str
    run: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A comparison.

    Attributes:
        name: Short name, a file name without its ending.
        about: What it asks, in a sentence.
        source: Paper and table or figure.
        run: What all runs have in common.
        tasks: The tasks.
        budgets: Budgets.
        seeds: Seeds.
        variants: Methods, baselines and options.
        rates: Learning rates to search on the validation split; none: none is searched.
        tuning_seeds: Seeds of the search, which are none of ``seeds``.
        calibration_seeds: Seeds of further calibrations, for the stability of allocations.
        reference: Label of the line that the others are compared with.
    """

    name: str
    about: str
    source: str
    run: Mapping[str, Any]
    tasks: tuple[TaskEntry, ...]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    rates: Rates = field(default_factory=Rates)
    tuning_seeds: tuple[int, ...] = ()
    calibration_seeds: tuple[int, ...] = ()
    reference: str = "uniform"

    def config(self, task: TaskEntry, variant: Variant) -> RunConfig:
        """Return the settings of a task's runs with one method.

        Args:
            task: The task.
            variant: The method.
        """
        where = f"recipe '{self.name}', task '{task.label}', method '{variant.label}'"
        layers = (flattened(part, where) for part in (self.run, task.run, variant.run))
        return run_config(stacked(layers), where)

    def budgets_on(self, task: TaskEntry) -> tuple[str, ...]:
        """Return the budgets of a task: its own, or those of the recipe.

        Args:
            task: The task.
        """
        return task.budgets or self.budgets

    def budgets_of(self, task: TaskEntry, variant: Variant) -> tuple[str, ...]:
        """Return the budgets at which a method runs on a task.

        Args:
            task: The task.
            variant: The method.
        """
        own = self.budgets_on(task)
        return tuple(b for b in own if b in variant.budgets) if variant.budgets else own

    def rates_of(self, task: TaskEntry, variant: Variant, budget: str) -> tuple[float, ...]:
        """Return the learning rates that are searched for a method on a task.

        Args:
            task: The task.
            variant: The method.
            budget: The budget, as the recipe writes it.
        """
        layers = (variant.rates, task.rates, self.rates)
        return next((found for layer in layers if (found := layer.of(budget))), ())

    def cells(self) -> Iterator[tuple[TaskEntry, Variant, str]]:
        """Yield every cell of the table.

        Yields:
            Task, method and budget.
        """
        for task in self.tasks:
            for budget in self.budgets_on(task):
                for variant in self.variants:
                    if budget in self.budgets_of(task, variant):
                        yield task, variant, budget


def stacked(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings laid over one another.

    Args:
        layers: The settings, the strongest last.

    Returns:
        The settings that hold.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        # A length in steps replaces one in epochs that stands below it, and the reverse.
        for one, other in (("steps", "epochs"), ("epochs", "steps"), ("task", "data")):
            if one in layer:
                merged.pop(other, None)
        merged |= layer
    return merged
