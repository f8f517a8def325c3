"""What an arm makes of a model's shapes: whether it can take them, and what it would train."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError, OptionError
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target
from gradrank.lab.arms import head_modules, head_options, shared_scale
from gradrank.lab.baselines.arm import Batch, Setting
from gradrank.lab.baselines.registry import create_baseline, is_baseline
from gradrank.lab.compare.dry_models import empty_model, outline, quietly
from gradrank.lab.models import model_head
from gradrank.methods.method import Assessment, CapacityMethod
from gradrank.methods.registry import create
from gradrank.session import allocate
from gradrank.signals.facts import model_facts
from gradrank.signals.layers import base_parameters

# As many directions as methods that price directions resolve by default.
_DIRECTIONS = 40
# The head's size has no part in what an arm does; with one number, tasks share the answer.
_CLASSES = 2
# Arms that are built otherwise for short runs, up to so many steps; all others share one answer for
# every length.
_TIMED = frozenset({"lora-dash", "peft-adalora"})
_LONG = 1_000


@dataclass(frozen=True, slots=True)
class Question:
    """An arm at a budget on a model; all that its answer depends on.

    Attributes:
        model: The model.
        head: Head of the data.
        targets: Modules that may be adapted, as in the recipe.
        method: Name of the method or baseline.
        options: Its options, lengths in steps.
        budget: As in the recipe.
        parameters: The same in parameters.
        steps: Optimizer steps; None where they are unknown.
        scaling: The scale that all arms share; None: ``lora_alpha`` by uniform LoRA's rank.
        lora_alpha: See there.
        lora_dropout: Dropout in front of an adapter.
    """

    model: str
    head: str
    targets: str
    method: str
    options: tuple[tuple[str, str], ...]
    budget: str
    parameters: int
    steps: int | None
    scaling: float | None
    lora_alpha: float
    lora_dropout: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an arm would train, without the task head.

    Attributes:
        final: Adapter parameters at the end; where ``exact`` is false, at most so many.
        peak: The most at any moment.
        exact: Whether ``final`` is known without data.
        how: How it is known, in words.
        matched: Whether the arm is held to the budget.
    """

    final: int
    peak: int
    exact: bool
    how: str
    matched: bool = True


class _DataNeededError(Exception):
    """An arm has come to the point where it reads data: all that shapes can refuse is passed."""


def footprint(question: Question) -> Footprint:
    """Rehearse an arm on shapes.

    Args:
        question: The arm, its budget and the model.

    Returns:
        What it would train. Whatever the arm refuses is raised as it would be in the run.
    """
    steps = question.steps
    if is_baseline(question.method) and question.method not in _TIMED:
        question = replace(question, steps=None)
    elif is_baseline(question.method) and steps and "prelaunch" not in dict(question.options):
        question = replace(question, steps=min(steps, _LONG))
    return _answered(question)


def measures(question: Question) -> bool:
    """Tell whether an arm's ranks follow from a calibration that another seed would change.

    Args:
        question: The arm.

    Returns:
        Whether they do; a baseline's are no plan of ours.
    """
    if is_baseline(question.method):
        return False
    return bool(create(question.method, dict(question.options)).signals())


@lru_cache(maxsize=4096)
def _answered(question: Question) -> Footprint:
    if is_baseline(question.method):
        return _baseline(question)
    return _method(question)


def _method(question: Question) -> Footprint:
    method = create(question.method, dict(question.options))
    targets = outline(question.model, question.head, _CLASSES, question.targets).targets
    budget = question.parameters
    measured = bool(method.signals())
    if measured:
        assessment = equal_assessment(targets)
        how = "rehearsed with equal scores"
    else:
        assessment = method.assess(targets, None)
        how = "planned without data"
    decide = method.capacities if isinstance(method, CapacityMethod) else method.ranks
    chosen = decide(targets, assessment, budget)
    spent = sum(PlannedTarget.of(t, chosen[t.name]).parameters for t in targets)
    if spent > budget:
        raise BudgetError(f"method '{question.method}' spends {spent:,} of {budget:,} parameters.")
    if spent == 0:
        raise BudgetError(
            f"method '{question.method}' gives no target a rank at {budget:,} parameters. Raise "
            "the budget."
        )
    if not hasattr(method, "course"):
        most = budget if measured else spent
        return Footprint(most, most, not measured, how)
    return _moving(method, question, targets, spent)


def _moving(method: Any, question: Question, targets: Sequence[Target], spent: int) -> Footprint:
    """Return the footprint of a method that moves capacity while training."""
    budget = question.parameters
    # The shape of a course does not depend on the length of the run; its timetable does.
    course = method.course(targets, budget, question.steps or 1_000_000)
    if question.steps is not None:
        course.schedule.check(f"method '{question.method}'")
    widest = sum(course.ceilings[target.name] * target.cost for target in targets)
    # A second stage may cost more than the first, up to the budget.
    peak = max(spent, budget, min(widest, course.allowed(0, widest)))
    how = "comes down to the budget" if peak > budget else "moves within the budget"
    return Footprint(budget, peak, False, how)


def equal_assessment(targets: Sequence[Target]) -> Assessment:
    """Return what a method sees if the data tells it nothing.

    Args:
        targets: The targets.
    """
    gains = {target.name: [1.0] * min(target.max_rank, _DIRECTIONS) for target in targets}
    return Assessment({target.name: 1.0 for target in targets}, gains=gains)


def _baseline(question: Question) -> Footprint:
    baseline = create_baseline(question.method, dict(question.options))
    matched, budget = bool(baseline.matched), question.parameters
    model = empty_model(question.model, question.head, _CLASSES)
    setting = _setting(question, model)
    if question.method == "eva":
        _check_eva(setting)
    try:
        with warnings.catch_warnings(), quietly(), torch.device("meta"):
            # Libraries remark on odd settings when the run itself begins.
            warnings.simplefilter("ignore")
            built = baseline.build(setting)
    except _DataNeededError:
        return Footprint(budget, budget, False, "starts from data, within the budget")
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    peak = trained - _head_size(question)
    if not matched:
        return Footprint(peak, peak, True, "not matched to the budget", matched=False)
    if peak > budget:
        return Footprint(budget, peak, False, "comes down to the budget")
    return Footprint(peak, peak, True, "built on shapes")


def _head_size(question: Question) -> int:
    return outline(question.model, question.head, _CLASSES, question.targets).head_parameters


def _setting(question: Question, model: Any) -> Setting:
    """Return what a baseline gets in a run, but for the data."""
    found = outline(question.model, question.head, _CLASSES, question.targets)
    facts = model_facts(model, question.targets)

    def uniform(parameters: int) -> Plan:
        return allocate(found.targets, "uniform", parameters, provenance=facts)

    kind = model_head(question.head)
    options: Mapping[str, Any] = head_options(model, kind)
    return Setting(
        model=model,
        targets=found.targets,
        budget=question.parameters,
        scaling=shared_scale(
            found.targets,
            question.budget,
            base_parameters(model),
            question.scaling,
            question.lora_alpha,
        ),
        steps=question.steps or 1_000_000,
        seed=0,
        batches=_no_batches,
        uniform=uniform,
        peft_options={**options, "lora_dropout": question.lora_dropout},
        head=() if kind == "lm" else head_modules(model),
    )


def _no_batches(_count: int) -> Iterator[Batch]:
    raise _DataNeededError


def _check_eva(setting: Setting) -> None:
    """Refuse what EVA would refuse after it has read the data.

    Raises:
        OptionError: If inputs have too few features for the directions.
    """
    whole = sum(target.cost for target in setting.targets)
    rank = setting.budget // whole
    narrow = min(setting.targets, key=lambda target: target.d_in)
    if 2 * rank > narrow.d_in:
        raise OptionError(
            f"'eva' needs {2 * rank} input features for rank {rank}, and '{narrow.name}' has "
            f"{narrow.d_in}. Lower the budget, or leave 'eva' out."
        )


def resolved(budget: str, targets: Sequence[Target], base: int) -> int:
    """Return a budget in parameters.

    Args:
        budget: As in a recipe.
        targets: The targets.
        base: Parameters of the base model.
    """
    return Budget.parse(budget).resolve(targets, base)
