"""What must hold before a dynamic run starts: everything that could not be done later."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradrank.adapters import guard
from gradrank.adapters.edits import Edit, Select
from gradrank.adapters.surgery import parameters_in_use
from gradrank.adapters.view import LoraSite, lora_sites, unsupported
from gradrank.core.errors import BudgetError, SurgeryError
from gradrank.methods.course import Course, DirectionCourse, NeuronCourse
from gradrank.signals.layers import is_compiled


def check_ready(
    model: nn.Module,
    optimizer: Any,
    adapter: str,
    course: Course,
    method: str,
    budget: int,
    resuming: bool = False,
) -> None:
    """Refuse, before training starts, what could not be done while it runs.

    Args:
        model: The PEFT model, as it is trained.
        optimizer: Its optimizer.
        adapter: Name of the adapter.
        course: The method's course.
        method: Name of the method, for messages.
        budget: Budget in parameters, for messages.
        resuming: Whether the adapter has the shape of a checkpoint already.

    Raises:
        SurgeryError: If layers cannot be edited, or not in this setting; with what to do.
        BudgetError: If more is in use than the course allows at the start.
    """
    impossible = unsupported(model, adapter)
    sites = lora_sites(model, adapter)
    if impossible:
        name, why = next(iter(impossible.items()))
        raise SurgeryError(
            f"{len(impossible)} target(s) cannot take part: '{name}' {why}. Leave them out of "
            "the adapter's target_modules."
        )
    if is_compiled(model):
        raise SurgeryError(
            "the model is compiled (torch.compile), and a compiled model sees neither hooks "
            "that are set later nor, without compiling again, new shapes. Train it without "
            "torch.compile, or use a static method."
        )
    fixed = guard.wrapping(model, optimizer)
    plain = [name for name, site in sites.items() if not site.masked]
    if fixed and plain:
        raise SurgeryError(
            f"this run keeps the shapes of parameters fixed ({fixed}), and {len(plain)} of "
            f"{len(sites)} layers have no ranks reserved. Call gradrank.reserve(model, method, "
            "budget) before the optimizer is made and the model is wrapped; with a Trainer, "
            "pass CapacityCallback to its constructor or call gradrank.prepare_trainer first."
        )
    _check_form(sites, fixed, course, method)
    if isinstance(course, NeuronCourse):
        _check_neurons(sites, fixed, course, method, resuming)
    edits: dict[str, Edit] = {
        n: Select(tuple(range(s.rank))) for n, s in sites.items() if s.partition is None
    }
    guard.check(sites, edits, optimizer, model=model)
    used = parameters_in_use(sites)
    if used > course.allowed(0, used):
        raise BudgetError(
            f"the adapter has {used:,} parameters, more than the budget of {budget:,}. "
            "Begin with lower ranks (gradrank.plan makes a fitting LoraConfig), or raise it."
        )


def check_surplus(course: Course, method: str, used: int, budget: int, one: int) -> None:
    """Refuse a run with nothing to take away, such as one reserved for another budget.

    Args:
        course: The method's course.
        method: Name of the method, for messages.
        used: Parameters in use.
        budget: Budget in parameters.
        one: Parameters of rank 1 on every target.

    Raises:
        BudgetError: If the course takes away, and the budget holds already.
    """
    if isinstance(course, DirectionCourse) and not course.elastic and used <= budget:
        raise BudgetError(
            f"method '{method}' takes directions away until a budget of {budget:,} parameters "
            f"holds, and the adapter has {used:,} to begin with (rank {used / one:g} on average). "
            "Give gradrank.reserve the same method and budget, or lower the budget."
        )


def first_rank(site: LoraSite, ceiling: int) -> int:
    """Return the rank of a layer in the first of two stages.

    Args:
        site: The layer.
        ceiling: Rank of the first stage, cut off at ``min(d_in, d_out)``.

    Returns:
        The ceiling; a layer that has more than ``min(d_in, d_out)`` keeps its rank.
    """
    most = min(site.linear("A").in_features, site.linear("B").out_features)
    return max(ceiling, site.rank) if ceiling == most else ceiling


def _check_form(
    sites: Mapping[str, LoraSite], fixed: str | None, course: Course, method: str
) -> None:
    """Refuse layers that are not in the form that the course works on."""
    prunes = isinstance(course, DirectionCourse)
    elastic = isinstance(course, DirectionCourse) and course.elastic
    wrong = [name for name, site in sites.items() if (site.form == "svd") != prunes]
    if wrong and prunes:
        raise SurgeryError(
            f"method '{method}' trains P diag(lambda) Q, and {len(wrong)} of {len(sites)} layers "
            f"('{wrong[0]}', ...) are plain. Call gradrank.reserve(model, '{method}', budget) "
            "before the optimizer is made; with a Trainer, pass CapacityCallback to its "
            "constructor."
        )
    if wrong:
        raise SurgeryError(
            f"method '{method}' works on plain LoRA factors, and {len(wrong)} layers "
            f"('{wrong[0]}', ...) are in SVD form. Call gradrank.settle(model) first."
        )
    if elastic and fixed:
        raise SurgeryError(
            f"method '{method}' adds directions to layers of any size, and this run keeps shapes "
            f"fixed ({fixed}). Train in one process, or use 'adalora' or 'gard-dynamic'."
        )
    if prunes and fixed in {"FSDP", "DeepSpeed"}:
        raise SurgeryError(
            f"method '{method}' looks at whole gradients before each optimizer step, and {fixed} "
            "shards them. Train under DistributedDataParallel or in one process, or use "
            "'gard-dynamic'."
        )


def _check_neurons(
    sites: Mapping[str, LoraSite],
    fixed: str | None,
    course: NeuronCourse,
    method: str,
    resuming: bool,
) -> None:
    """Refuse layers that do not have the rank of the first stage, and are not in the second."""
    wrong = {
        name: site.rank
        for name, site in sites.items()
        if site.partition is None and site.rank != first_rank(site, course.ceilings[name])
    }
    # After the split a target of which all or no rows are dominant is a plain layer.
    split = resuming or any(site.partition is not None for site in sites.values())
    if wrong and not split:
        name, rank = next(iter(wrong.items()))
        raise SurgeryError(
            f"method '{method}' starts with uniform LoRA of rank {course.ceilings[name]}, and "
            f"{len(wrong)} of {len(sites)} layers have another one ('{name}': {rank}). Call "
            f"gradrank.reserve(model, '{method}', budget) before the optimizer is made (with a "
            "Trainer, pass CapacityCallback to its constructor), or give the option rank."
        )
    dead = [n for n, s in sites.items() if "B" in s.factors and not s.raw("B").requires_grad]
    if dead and course.start == "restart":
        raise SurgeryError(
            f"method '{method}' restarts with B = 0, and B of {len(dead)} layers ('{dead[0]}', "
            "...) is frozen: they would never change anything again. Train B, or use start=warm."
        )
    if fixed in {"FSDP", "DeepSpeed"}:
        raise SurgeryError(
            f"method '{method}' looks at whole gradients before each optimizer step, and {fixed} "
            "shards them. Train under DistributedDataParallel or in one process."
        )
