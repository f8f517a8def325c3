"""What the parts of a recipe must keep between them: references, seeds, trials and budgets."""

from collections.abc import Iterable, Sequence

from gradrank.core.errors import OptionError, nearest
from gradrank.lab.benchmarks.task import check_scoring
from gradrank.lab.compare.recipe import Recipe, TaskEntry
from gradrank.lab.tasks import TASKS


def check_whole(recipe: Recipe, where: str) -> None:
    """Refuse a recipe whose parts do not fit together.

    Args:
        recipe: The recipe.
        where: How to call it in messages.

    Raises:
        OptionError: If its reference, seeds, trials, validation or budgets contradict one another.
    """
    labels = [variant.label for variant in recipe.variants]
    if recipe.reference not in labels:
        raise OptionError(
            f"{where}: the reference '{recipe.reference}' is none of its methods. "
            f"{nearest(recipe.reference, labels)}"
        )
    # A misspelt budget would have no rates, and be told of missing trials otherwise.
    _check_budgets(recipe, where)
    _check_seeds(recipe, where)
    for task in recipe.tasks:
        searched = _trials(recipe, task, where) > 0
        for variant in recipe.variants:
            config = recipe.config(task, variant)
            known = TASKS.get(config.task or "")
            head, choices = (known.head, known.choices) if known else ("", False)
            check_scoring(config.scoring, config.task or "", head, choices)
            if searched and not config.validation:
                raise OptionError(
                    f"{where}, task '{task.label}': learning rates are searched, and no examples "
                    "are held out to choose by. Set 'validation' (examples) under 'run'."
                )


def _trials(recipe: Recipe, task: TaskEntry, where: str) -> int:
    """Return how many rates every method searches at every budget of a task."""
    trials = {
        (variant.label, budget): len(recipe.rates_of(task, variant, budget))
        for variant in recipe.variants
        for budget in recipe.budgets_of(task, variant)
    }
    most = max(trials.values(), default=0)
    fewer = next(((*arm, n) for arm, n in trials.items() if n < most), None)
    if fewer is not None:
        raise OptionError(
            f"{where}, task '{task.label}': '{fewer[0]}' searches {fewer[2]} learning rates at "
            f"budget '{fewer[1]}', and others search {most}. Give each as many trials as the "
            "others, at every budget."
        )
    return most


def _check_seeds(recipe: Recipe, where: str) -> None:
    overlap = sorted(set(recipe.seeds) & set(recipe.tuning_seeds))
    if overlap:
        raise OptionError(
            f"{where}: seed {overlap[0]} both chooses learning rates and is reported. Take other "
            "tuning_seeds."
        )
    searched = any(recipe.rates_of(*cell) for cell in recipe.cells())
    if searched and not recipe.tuning_seeds:
        raise OptionError(
            f"{where}: learning rates are given, and 'tuning_seeds' is empty, so that none would "
            "be searched. Name a seed that is not reported, or leave 'tuning_seeds' out."
        )


def _check_budgets(recipe: Recipe, where: str) -> None:
    """Refuse budgets at which nobody runs, and those at which the reference does not."""
    known = list(dict.fromkeys(b for t in recipe.tasks for b in recipe.budgets_on(t)))
    _check_known(recipe.rates.at, known, f"{where}: 'learning_rates'")
    for task in recipe.tasks:
        who = f"{where}, task '{task.label}': 'learning_rates'"
        _check_known(task.rates.at, recipe.budgets_on(task), who)
    for variant in recipe.variants:
        who = f"{where}: method '{variant.label}'"
        _check_known(variant.budgets, known, who)
        _check_known(variant.rates.at, variant.budgets or known, f"{who}, under 'learning_rates',")
    _check_reference(recipe, where)


def _check_known(named: Iterable[str], known: Sequence[str], who: str) -> None:
    stray = next((budget for budget in named if budget not in known), None)
    if stray is not None:
        raise OptionError(
            f"{who} names the budget '{stray}', which is none of those that run there: "
            f"{', '.join(known)}."
        )


def _check_reference(recipe: Recipe, where: str) -> None:
    reference = next(v for v in recipe.variants if v.label == recipe.reference)
    for task in recipe.tasks:
        for budget in recipe.budgets_on(task):
            arms = [v for v in recipe.variants if budget in recipe.budgets_of(task, v)]
            if arms and reference not in arms:
                raise OptionError(
                    f"{where}, task '{task.label}', budget '{budget}': the reference "
                    f"'{recipe.reference}' does not run there, so that nothing can be compared "
                    f"with it; these do: {', '.join(arm.label for arm in arms)}. Name one that "
                    "runs at every budget as 'reference', or leave the budget out."
                )
