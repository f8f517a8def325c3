"""Measure and allocate, as ``plan``, ``train`` and ``demo`` do it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradrank.cli.console import Console
from gradrank.cli.prepare import Prepared
from gradrank.cli.settings import Settings
from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError
from gradrank.core.plan import Plan
from gradrank.core.targets import Target
from gradrank.lab.measured import measured_signals, narrow
from gradrank.lab.memory import PeakMemory
from gradrank.methods.method import Assessment
from gradrank.methods.registry import create
from gradrank.session import allocate, measure
from gradrank.signals.facts import find_targets, model_facts
from gradrank.signals.layers import base_parameters
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement


def make_plan(
    prepared: Prepared, settings: Settings, console: Console, all_signals: bool = False
) -> tuple[Plan, Measurement | None]:
    """Measure, if the method needs it, and allocate.

    Args:
        prepared: Model and data.
        settings: What was asked for.
        console: Shows how far the measuring is.
        all_signals: Whether to measure what other methods need too, in the same pass, so that
            they can be tried on the same measurement later.

    Returns:
        The plan, and the measurement it rests on.
    """
    method = create(settings.method, settings.options)
    rehearse(prepared, [method], settings)
    if not method.signals():
        return plan_without_data(prepared, method, settings), None
    signals = measured_signals(method) if all_signals else method.signals()
    measurement = take_measurement(prepared, signals, settings, console)
    return allocate(narrow(measurement, method.signals()), method, settings.budget), measurement


def plan_without_data(prepared: Prepared, method: Any, settings: Settings) -> Plan:
    """Allocate by a method that looks at no data.

    Args:
        prepared: Model and data.
        method: The method.
        settings: What was asked for.

    Returns:
        The plan.
    """
    model = prepared.loaded.model
    facts = model_facts(model, settings.targets) | prepared.facts(settings)
    return allocate(
        find_targets(model, settings.targets), method, settings.budget, provenance=facts
    )


def take_measurement(
    prepared: Prepared, signals: Sequence[Signal], settings: Settings, console: Console
) -> Measurement:
    """Measure mini-batches of the training data.

    Args:
        prepared: Model and data.
        signals: What to measure; one pass serves all sketches.
        settings: What was asked for.
        console: Shows how far it is.

    Returns:
        The measurement; its ``info`` also says where it comes from and what it cost.
    """
    batches = prepared.data.batches(
        settings.batches * settings.accumulate, settings.batch_size, settings.measuring_seed
    )
    with PeakMemory(prepared.device) as memory, console.progress("measuring") as report:
        measurement = measure(
            prepared.loaded.model,
            batches,
            signals,
            settings.targets,
            num_batches=settings.batches,
            accumulate=settings.accumulate,
            seed=settings.measuring_seed,
            checkpoint=settings.checkpoint,
            max_memory=settings.max_memory,
            progress=lambda done, total: report(done, total, ""),
        )
    info = {
        **measurement.info,
        **prepared.facts(settings),
        "peak_memory_bytes": memory.peak,
    }
    return replace(measurement, info=info)


def rehearse(prepared: Prepared, methods: Sequence[Any], settings: Settings) -> None:
    """Refuse a budget that no score could make work, before minutes of measuring.

    Args:
        prepared: Model and data.
        methods: The methods.
        settings: What was asked for.

    Raises:
        BudgetError: If the budget is below the floor or above what may be spent.
    """
    targets = find_targets(prepared.loaded.model, settings.targets)
    budget = Budget.parse(settings.budget).resolve(targets, base_parameters(prepared.loaded.model))
    for method in methods:
        try:
            method.ranks(targets, _equal(targets), budget)
        except BudgetError:
            raise
        except Exception:
            continue


def _equal(targets: Sequence[Target]) -> Assessment:
    scores = {target.name: 1.0 for target in targets}
    return Assessment(scores, gains={t.name: [1.0] * min(t.max_rank, 40) for t in targets})
