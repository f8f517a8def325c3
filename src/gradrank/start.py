"""The method of a dynamic run, and the shape that an adapter has to begin with."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradrank.adapters.neurons import reserve_neurons
from gradrank.adapters.reserve import reserve_ranks, start_svd
from gradrank.adapters.view import adapter_name, lora_sites, lora_targets
from gradrank.capacity import resolve
from gradrank.core.budget import Budget
from gradrank.core.errors import OptionError
from gradrank.methods.course import Course, DirectionCourse, DynamicMethod, NeuronCourse
from gradrank.methods.method import Method
from gradrank.methods.registry import create
from gradrank.ready import first_rank
from gradrank.signals.distributed import is_distributed


def reserve(
    model: nn.Module,
    method: "str | Method" = "gard-dynamic",
    budget: "str | int | Budget" = "uniform:8",
    *,
    options: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    seed: int = 0,
    fixed: bool | None = None,
) -> None:
    """Give an adapter the shape that a dynamic method starts from.

    Call it before the optimizer is made and the model is wrapped.

    Methods that prune (``igu``, ``igu-direction``, ``adalora``) start with more than the budget:
    the adapter is widened to their initial rank and written as ``P diag(lambda) Q``. ``pilora``
    starts with uniform LoRA of its rank r, which may be above the budget too.
    ``gard-dynamic`` needs it only where several processes train (DistributedDataParallel, FSDP2,
    DeepSpeed), where parameters cannot change their shape: the ranks that it may reach are
    reserved. Components that are not in use are then masked: they change nothing, get no gradient
    and count for nothing in the budget, but they take memory. After training,
    :func:`gradrank.settle` gives the layers their real ranks and plain factors.

    Args:
        model: The PEFT model.
        method: The dynamic method that will run, or its name.
        budget: Its budget.
        options: Options, when the method is given by name.
        adapter: Name of the adapter, if several are active.
        seed: Seed of the directions of an adapter that is still zero.
        fixed: Whether a method that prunes keeps the shapes fixed; None: where several processes
            train.
    """
    course = _course(model, dynamic_method(method, options), budget, adapter)
    keeps = is_distributed() if fixed is None else fixed
    if isinstance(course, DirectionCourse):
        start_svd(model, course.ceilings, adapter, seed, keeps, course.init)
    elif isinstance(course, NeuronCourse):
        sites = lora_sites(model, adapter_name(model, adapter))
        ranks = {n: first_rank(sites[n], rank) for n, rank in course.ceilings.items()}
        reserve_neurons(model, ranks, course.supplementary, adapter, keeps, seed)
    else:
        reserve_ranks(model, course.ceilings, adapter)


def starts_wide(
    model: nn.Module, method: DynamicMethod, budget: Budget, adapter: str | None = None
) -> bool:
    """Tell whether a method starts with another shape than a plan for its budget has.

    Args:
        model: The PEFT model.
        method: The method.
        budget: Its budget.
        adapter: Name of the adapter, if several are active.

    Returns:
        Whether it does, so that :func:`reserve` has to be called before every run.
    """
    return isinstance(_course(model, method, budget, adapter), DirectionCourse | NeuronCourse)


def _course(
    model: nn.Module, method: DynamicMethod, budget: "str | int | Budget", adapter: str | None
) -> Course:
    """A course whose shapes are right; they do not depend on the length of the run."""
    targets = lora_targets(model, adapter_name(model, adapter))
    return method.course(targets, resolve(model, targets, budget), 1)


def dynamic_method(method: "str | Method", options: Mapping[str, Any] | None) -> DynamicMethod:
    """Return a dynamic method, built from its name if need be.

    Args:
        method: A method or its name.
        options: Options, when it is given by name.

    Returns:
        The method.

    Raises:
        OptionError: If the method is static: it decides once, before training.
    """
    if options and not isinstance(method, str):
        raise OptionError("options belong to the method object; pass them to its constructor.")
    chosen = create(method, options) if isinstance(method, str) else method
    if not isinstance(chosen, DynamicMethod):
        name = getattr(chosen, "name", type(chosen).__name__)
        raise OptionError(
            f"method '{name}' decides once, before training; use plan.lora_config() or "
            "gradrank.apply(plan, model). 'gard-dynamic', 'igu', 'adalora' and 'pilora' move "
            "capacity while training."
        )
    return chosen
