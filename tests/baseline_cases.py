"""Settings of comparisons on the tiny models, as the baselines get them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cases import CASES, batches
from gradrank.allocation import uniform
from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target, cost_of_rank_one
from gradrank.lab.baselines.arm import Batch, Setting
from gradrank.signals.facts import find_targets

SCALE, STEPS = 1.7, 20
HEADS = {"bert": ("classifier",), "vit": ("classifier",)}


def whole_of(setting: Setting) -> int:
    return cost_of_rank_one(setting.targets)


def setting_of(
    case: str,
    ranks: float = 2.0,
    budget: int | None = None,
    targets: tuple[Target, ...] | None = None,
    **options: Any,
) -> Setting:
    """A setting whose budget is that of so many uniform ranks; the model's SVDs are not flat."""
    model = CASES[case].model()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    found = targets or tuple(find_targets(model))
    head = HEADS.get(case, ())
    peft: dict[str, Any] = {"modules_to_save": list(head)} if head else {"task_type": "CAUSAL_LM"}

    def plan(parameters: int) -> Plan:
        return uniform_plan(found, parameters)

    def draw(count: int) -> Iterator[Batch]:
        return iter(batches(CASES[case], count, seed=3))

    given: dict[str, Any] = {
        "model": model,
        "targets": found,
        "budget": budget or int(ranks * cost_of_rank_one(found)),
        "scaling": SCALE,
        "steps": STEPS,
        "seed": 0,
        "batches": draw,
        "uniform": plan,
        "peft_options": peft,
        "head": head,
    }
    return Setting(**given | options)


def uniform_plan(targets: tuple[Target, ...], parameters: int) -> Plan:
    """Uniform ranks; below rank 1, rank 1 on the first targets that fit."""
    if parameters >= cost_of_rank_one(targets):
        ranks = uniform(targets, parameters)
    else:
        ranks, left = {}, parameters
        for target in targets:
            ranks[target.name] = int(target.cost <= left)
            left -= target.cost * ranks[target.name]
        if not any(ranks.values()):
            raise BudgetError(f"{parameters} parameters are not enough.")
    planned = tuple(PlannedTarget(target, ranks[target.name]) for target in targets)
    return Plan("uniform", {}, Budget.parameters(parameters), parameters, planned)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
