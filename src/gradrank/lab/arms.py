"""From a plan to what the Trainer needs: what moves capacity, the task head, the scale."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gradrank.callback import CapacityCallback
from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError
from gradrank.core.plan import Plan
from gradrank.core.targets import Target
from gradrank.methods.registry import METHODS, create
from gradrank.session import allocate
from gradrank.signals.layers import head_beside_base

HEAD_NAMES = ("score", "classifier", "classification_head")
"""What transformers calls the module that a task head is; :func:`head_modules` tells the rest."""


def moving(plan: Plan, steps: int, seed: int) -> CapacityCallback | None:
    """Return what moves capacity while training, if the plan's method does.

    Args:
        plan: The plan, whose ranks are those of the start.
        steps: Optimizer steps of the run.
        seed: Seed of the run.

    Returns:
        The callback; None for a static method.
    """
    if plan.method not in METHODS or not hasattr(METHODS[plan.method], "course"):
        return None
    method = create(plan.method, plan.options)
    targets = [planned.target for planned in plan.targets]
    course = method.course(targets, plan.budget_parameters, steps)
    course.schedule.check(f"method '{plan.method}'")
    return CapacityCallback(method, Budget.parameters(plan.budget_parameters), seed=seed)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that are a model's task head.

    Some heads are more than one module, of which the first ones have names that mean something
    else elsewhere (DeBERTa's ``pooler``): those count where they stand beside the pre-trained
    model.

    Args:
        model: A model for classes, without an adapter.

    Returns:
        Names of children of the model.
    """
    children = {name for name, _ in model.named_children()}
    return (*(name for name in HEAD_NAMES if name in children), *head_beside_base(model))


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a task head; beside an adapter those of its trained copy alone.

    Args:
        model: A model for classes, plain or wrapped by PEFT.

    Returns:
        Parameters, in model order.
    """
    if not hasattr(model, "peft_config"):
        heads = head_modules(model)
        return [p for name, p in model.named_parameters() if name.partition(".")[0] in heads]
    return [p for name, p in model.named_parameters() if ".modules_to_save." in name]


def stray_weights(model: PreTrainedModel, new: Collection[str]) -> list[str]:
    """Return new, random matrices that nothing would train, because they are in no known head.

    Args:
        model: A model for classes, as loaded.
        new: Names of all weights that its files lack.

    Returns:
        Names of those beside the pre-trained model and beside its head; vectors (norms and biases,
        which begin as identities) are left out.
    """
    known = {*head_modules(model), model.base_model_prefix}
    return [
        name
        for name, tensor in model.state_dict().items()
        if name in new and tensor.dim() > 1 and name.partition(".")[0] not in known
    ]


def head_options(model: nn.Module, head: str) -> dict[str, Any]:
    """Return the PEFT options by which a task head is trained in full and saved.

    Args:
        model: The model.
        head: ``lm``, ``instruct``, ``classification`` or ``image``.

    Returns:
        Keyword arguments of a PEFT configuration.
    """
    if head in {"lm", "instruct"}:
        return {"task_type": "CAUSAL_LM"}
    options: dict[str, Any] = {"modules_to_save": list(head_modules(model))}
    if head == "classification":
        options["task_type"] = "SEQ_CLS"
    return options


def shared_scale(
    targets: Sequence[Target], budget: str, base: int, scaling: float | None, alpha: float
) -> float:
    """Return the scale that all arms of a budget share.

    Args:
        targets: The targets.
        budget: As in the recipe.
        base: Parameters of the base model.
        scaling: The recipe's own; None: ``alpha`` by the rank of uniform LoRA.
        alpha: ``lora_alpha``.

    Raises:
        BudgetError: If uniform LoRA does not exist at the budget, and the recipe names no scale.
    """
    if scaling is not None:
        return scaling
    try:
        plan = allocate(targets, "uniform", budget, provenance={"base_parameters": base})
    except BudgetError as error:
        raise BudgetError(
            f"the arms' common scale is 'lora_alpha' by uniform LoRA's rank, and there is none: "
            f"{error} Or set 'scaling' under 'run', which is then the scale at every budget."
        ) from error
    return alpha / plan.reference_rank
