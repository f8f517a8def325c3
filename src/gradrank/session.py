"""Floor 5: measure, allocate, plan, apply, as plain functions."""

import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradrank.adapters.apply import apply_plan
from gradrank.core.budget import Budget
from gradrank.core.bytesize import parse_bytes
from gradrank.core.errors import BudgetError, MeasurementError, OptionError
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, CapacityMethod, Method
from gradrank.methods.registry import create
from gradrank.reliability import split_half
from gradrank.serving.export import ExportReport, export
from gradrank.signals.distributed import all_or_none, is_distributed, merge_across_processes
from gradrank.signals.facts import find_targets, model_facts, model_name
from gradrank.signals.layers import ALL_LINEAR, ambiguous_suffixes, base_parameters, find_sites
from gradrank.signals.measure import (
    LossFunction,
    Progress,
    Signal,
    run,
    scheme_for,
)
from gradrank.signals.measurement import Measurement
from gradrank.signals.requests import asked_for
from gradrank.signals.scheme import Scheme, agreed

__all__ = ["ExportReport", "allocate", "apply", "export", "measure", "plan"]


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    signal: "str | Signal | Sequence[str | Signal]" = "spectrum",
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    num_batches: int = 32,
    accumulate: int = 1,
    seed: int = 0,
    loss_function: LossFunction | None = None,
    progress: Progress | None = None,
    checkpoint: bool | None = None,
    max_memory: int | str | None = None,
) -> Measurement:
    """Measure gradients of a few mini-batches.

    The model is handed back as it was found: no hook, no ``requires_grad``, no mode and no random
    state changes, also after an error. Under ``torch.distributed`` every process measures its own
    batches and all end with the same merged measurement.

    Args:
        model: The model, plain or wrapped by PEFT, in any dtype, frozen or not, quantised or not.
        batches: Mini-batches (mappings with labels, as for training).
        signal: ``"spectrum"`` (GARD), ``"mean-gradient"`` (water-filling), requests with options
            (``MeanGradient(rows=True)`` for partitions of rows),
            or several of these: one pass serves all sketches.
        targets: ``"all-linear"`` or names of modules.
        num_batches: Mini-batches M to take, per process.
        accumulate: Micro-batches per mini-batch: the gradient of a mini-batch is that of
            ``accumulate`` items of ``batches`` together.
        seed: Seed of sketches, shuffling and dropout while measuring.
        loss_function: ``(model, batch) -> scalar``; default: the model's own loss.
        progress: Called with (done, total) after each mini-batch, in every pass over them.
        checkpoint: Whether the model's repeated blocks keep only their inputs and are computed
            again in the backward pass (nearly half as much work again). Default: if ``max_memory``
            asks for it. A model whose own gradient checkpointing is on is measured with it.
        max_memory: Cap on what measuring holds on the model's device beyond the model and its
            batches, in bytes or as ``"8GiB"``. It is met by checkpointing, then by several passes
            over the batches with a block of targets in each; the statistics are the same. What is
            kept is an estimate from a forward pass of the largest micro-batch. Finished statistics
            go to the host and are not counted.

    Returns:
        The measurement; its ``info`` says how many ``passes`` were made, and whether
        ``checkpointed``.

    Raises:
        OptionError: If the signal is unknown or a count is below 1.
    """
    if num_batches < 1 or accumulate < 1:
        raise OptionError(
            f"num_batches={num_batches} and accumulate={accumulate} must be at least 1."
        )
    signals = asked_for(signal)
    sites = find_sites(model, targets)
    found = [site.target for site in sites]
    cap = None if max_memory is None else parse_bytes(max_memory)

    def decide() -> tuple[list[list[Any]], Scheme]:
        groups = _take(batches, num_batches, accumulate, seed)
        chosen = scheme_for(model, sites, groups, signals, loss_function, checkpoint, cap)
        return groups, chosen

    def work(groups: list[list[Any]], scheme: Scheme) -> Measurement:
        return run(model, sites, groups, signals, seed, loss_function, progress, scheme)

    if cap is None:
        own = all_or_none(lambda: work(*decide()))
    else:
        groups, scheme = all_or_none(decide)
        scheme = agreed(scheme)
        own = all_or_none(lambda: work(groups, scheme))
    measurement = merge_across_processes(own)
    info = {
        **measurement.info,
        "base_parameters": base_parameters(model),
        "ambiguous_suffixes": ambiguous_suffixes(model, found),
        "model_name": model_name(model),
        "accumulate": accumulate,
        "max_memory": cap,
        "processes": torch.distributed.get_world_size() if is_distributed() else 1,
    }
    return Measurement(measurement.targets, measurement.spectrum, measurement.mean_gradient, info)


def allocate(
    measurement: Measurement | Sequence[Target],
    method: "str | Method" = "gard",
    budget: "str | int | Budget" = "uniform:8",
    *,
    options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide where the budget goes.

    Args:
        measurement: A measurement; or plain targets, for methods that look at no data.
        method: Name of a method, or a method with its options.
        budget: Parameters (``200000``), ``"uniform:8"``, a percentage (``"0.5%"``) or a Budget.
        options: Options, when the method is given by name.
        provenance: Further facts to keep in the plan.

    Returns:
        The plan; it never spends more than the budget.

    Raises:
        OptionError: If the method is unknown, or options are given beside a method object.
        MeasurementError: If the method needs a measurement.
        BudgetError: If the method overspends (a defect of the method).
    """
    chosen = _method(method, options)
    known = measurement if isinstance(measurement, Measurement) else None
    targets = known.targets if known else tuple(measurement)  # pyright: ignore[reportArgumentType]
    if chosen.signals() and known is None:
        raise MeasurementError(
            f"method '{chosen.name}' needs a measurement, and only targets were given. Call "
            "measure(model, batches) first."
        )
    info = dict(known.info) if known else {}
    info |= dict(provenance or {})
    budget = Budget.parse(budget)
    parameters = budget.resolve(targets, int(info.get("base_parameters") or 0))
    assessment = chosen.assess(targets, known)
    planned = _planned(chosen, targets, assessment, parameters)
    spent = sum(item.parameters for item in planned)
    if spent > parameters:
        raise BudgetError(f"method '{chosen.name}' spent {spent:,} of {parameters:,} parameters.")
    reliability = None
    if known is not None and chosen.signals():
        reliability = split_half(chosen, targets, known, assessment)
    return Plan(
        method=chosen.name,
        options=_options(chosen),
        budget=budget,
        budget_parameters=parameters,
        targets=planned,
        reliability=reliability,
        provenance={
            # The root package names all floors, so it is not imported but looked up.
            "gradrank": importlib.import_module("gradrank").__version__,
            **info,
            "batches": known.batches if known else 0,
        },
    )


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    method: "str | Method" = "gard",
    budget: "str | int | Budget" = "uniform:8",
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    options: Mapping[str, Any] | None = None,
    **measuring: Any,
) -> Plan:
    """Measure and allocate in one step: the two-line use.

    Args:
        model: The model.
        batches: Mini-batches (mappings with labels, as for training).
        method: Name of a method, or a method with its options.
        budget: Parameters (``200000``), ``"uniform:8"``, a percentage (``"0.5%"``) or a Budget.
        targets: ``"all-linear"`` or names of modules.
        options: Options, when the method is given by name.
        **measuring: Further arguments of :func:`measure` (``num_batches``, ``max_memory``, ...).

    Returns:
        The plan; ``get_peft_model(model, plan.lora_config())`` builds it.
    """
    chosen = _method(method, options)
    budget = Budget.parse(budget)
    if chosen.signals():
        measurement = measure(model, batches, chosen.signals(), targets, **measuring)
        return allocate(measurement, chosen, budget)
    return allocate(
        find_targets(model, targets), chosen, budget, provenance=model_facts(model, targets)
    )


def apply(plan: Plan, model: nn.Module, lora_alpha: float = 16, **options: Any) -> Any:
    """Build the PEFT model of a plan and check that it is exactly that.

    Args:
        plan: The plan.
        model: The base model; its modules are wrapped in place, as PEFT does.
        lora_alpha: Alpha at the reference rank.
        **options: ``scaling``, ``policy`` and any field of ``peft.LoraConfig``.

    Returns:
        The ``peft.PeftModel``.

    Raises:
        PlanError: If the plan names modules that the model lacks or shapes that it does not have,
            or what was built is not exactly the plan.
        OptionError: If an option would contradict the plan, or the policy is unknown.
    """
    return apply_plan(plan, model, lora_alpha, **options)


def _take(batches: Iterable[Any], num_batches: int, accumulate: int, seed: int) -> list[list[Any]]:
    """Draw the batches, with the random state as it was afterwards (loaders shuffle by it)."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well.
        torch.default_generator.manual_seed(seed)
        items = list(itertools.islice(batches, num_batches * accumulate))
    groups = [items[i : i + accumulate] for i in range(0, len(items), accumulate)]
    if groups and len(groups[-1]) < accumulate:
        groups.pop()
    if not groups:
        raise MeasurementError(
            f"the data gave {len(items)} batches, fewer than the {accumulate} that one mini-batch "
            "takes. Give more data, or smaller batches."
        )
    return groups


def _method(method: "str | Method", options: Mapping[str, Any] | None) -> Method:
    if isinstance(method, str):
        return create(method, options)
    if options:
        raise OptionError("options belong to the method object; pass them to its constructor.")
    return method


def _planned(
    method: Method, targets: Sequence[Target], assessment: Assessment, budget: int
) -> tuple[PlannedTarget, ...]:
    decide = method.capacities if isinstance(method, CapacityMethod) else method.ranks
    chosen = decide(targets, assessment, budget)
    return tuple(
        PlannedTarget.of(
            target,
            chosen[target.name],
            float(assessment.scores[target.name]),
            assessment.details.get(target.name),
        )
        for target in targets
    )


def _options(method: Any) -> dict[str, Any]:
    # Not __dataclass_fields__, which lists class variables (name, summary, source) too.
    known = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {item.name: getattr(method, item.name) for item in known}
