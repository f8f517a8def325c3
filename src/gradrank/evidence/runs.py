"""One record of a comparison, read and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradrank.core.errors import DataError
from gradrank.evidence.findings import Outcome
from gradrank.evidence.items import Items, read_items
from gradrank.evidence.metrics import METRICS, find_metric, metric_value
from gradrank.evidence.shapes import is_whole, ranks_of
from gradrank.record.run import RunRecord

PHASES = ("tune", "final", "stability")
_SAME = ("steps", "epochs", "batch_size", "accumulate", "train_examples")
_MACHINE = ("device", "dtype")
_DATA = ("train_examples", "train_tokens", "note")
_AGREE = 1e-3
"""Records keep log-likelihoods to six digits, so their mean is not the metric to the last bit."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where a record stands in its comparison.

    Attributes:
        record: The record.
        run_id: Its name.
        recipe: Name of the recipe.
        phase: ``tune``, ``final`` or ``stability``.
        task: Task.
        method: Label of the arm.
        budget: Budget as in the recipe.
        seed: Seed.
        lr: Learning rate.
        metric: The metric that counts; None where a run failed before it was known.
        matched: Whether the arm is held to the budget.
        notes: What a reader of the result must know.
    """

    record: RunRecord
    run_id: str
    recipe: str
    phase: str
    task: str
    method: str
    budget: str
    seed: int
    lr: float | None
    metric: str | None
    matched: bool
    notes: tuple[str, ...]

    @property
    def cell(self) -> tuple[str, str, str]:
        """Task, budget and method."""
        return self.task, self.budget, self.method

    @property
    def place(self) -> tuple[Any, ...]:
        """What only one run may be: its cell's run of a seed (and of a rate, when tuning)."""
        rate = self.lr if self.phase == "tune" else None
        return self.phase, *self.cell, self.seed, rate

    @property
    def allowed(self) -> int | None:
        """Adapter parameters that the run was allowed, if the record says so."""
        about, plan = self.record.comparison or {}, self.record.plan or {}
        stated = about.get("budget_parameters")
        budget = plan.get("budget")
        planned = budget.get("parameters") if isinstance(budget, Mapping) else None
        return next((n for n in (stated, planned) if is_whole(n)), None)

    @property
    def message(self) -> str:
        """What a failed run says of itself."""
        said = (self.record.comparison or {}).get("message")
        return said if isinstance(said, str) and said else "failed without a message"


def name_of(record: RunRecord) -> str:
    """Return what a record is called where it cannot be read: its run, or its label.

    Args:
        record: The record.

    Returns:
        A name.
    """
    said = (record.comparison or {}).get("run")
    return said if isinstance(said, str) and said else record.name


def read_run(record: RunRecord) -> Run:
    """Read where a record stands in its comparison.

    Args:
        record: The record.

    Returns:
        The run.

    Raises:
        DataError: If the record is of no comparison, or a field of it is not as it must be.
    """
    about = record.comparison
    if about is None:
        raise DataError("it holds no 'comparison': a run of its own")
    words = {name: _text(about, name) for name in ("recipe", "phase", "task", "method", "budget")}
    if words["phase"] not in PHASES:
        raise DataError(f"its phase is {words['phase']!r}, none of {', '.join(PHASES)}")
    if not is_whole(about.get("seed")):
        raise DataError(f"its seed is {about.get('seed')!r}, no whole number")
    rate, matched, notes = about.get("lr"), about.get("matched", True), about.get("notes") or []
    if rate is not None and _number(rate) is None:
        raise DataError(f"its learning rate is {rate!r}, no number")
    if not isinstance(matched, bool) or not isinstance(notes, list):
        raise DataError("its 'matched' or 'notes' is not as a comparison writes it")
    return Run(
        record=record,
        run_id=_run_id(about, words, rate),
        seed=about["seed"],
        lr=None if rate is None else float(rate),
        metric=_metric(about, record.status),
        matched=matched,
        notes=tuple(str(note) for note in notes),
        **words,
    )


def read_outcome(run: Run) -> tuple[Outcome, Items]:
    """Read a finished run of the reported phase.

    Args:
        run: The run; its metric is known.

    Returns:
        The outcome, and its items as arrays.

    Raises:
        DataError: If the record lacks what a comparison needs, or contradicts itself.
        ArithmeticError: If the run diverged; the text says how it shows.
    """
    record = run.record
    if record.items is None:
        raise DataError("it holds no items, so it cannot be compared item by item")
    items = read_items(record.items)
    refuse_diverged(items)
    value = metric_value(str(run.metric), items)
    if not math.isfinite(value):
        raise ArithmeticError(f"diverged: its {run.metric} is not finite")
    stated = _number(record.metrics.get(str(run.metric)))
    if stated is not None and not math.isclose(stated, value, rel_tol=_AGREE, abs_tol=_AGREE):
        raise DataError(
            f"its {run.metric} is {stated:.6g}, but its items give {value:.6g}: one of them was "
            "changed"
        )
    counts = [record.trainable_parameters.get(name) for name in ("peak", "final")]
    other = record.trainable_parameters.get("other", 0)
    if not all(is_whole(count) for count in (*counts, other)):
        raise DataError("it does not say how many parameters it trained")
    return (
        Outcome(
            run_id=run.run_id,
            task=run.task,
            method=run.method,
            budget=run.budget,
            seed=run.seed,
            lr=run.lr,
            value=value,
            items=record.items,
            peak=int(counts[0] or 0),
            final=int(counts[1] or 0),
            other=other,
            train_seconds=_number(record.cost.get("train_seconds")),
            calibration_seconds=_first(record.cost, ("calibration_seconds", "measure_seconds")),
            peak_memory_bytes=_number(record.cost.get("peak_memory_bytes")),
            ranks=ranks_of(record, -1),
            matched=run.matched,
            notes=run.notes,
            setting=_setting(record),
        ),
        items,
    )


def _setting(record: RunRecord) -> dict[str, Any]:
    given = record.config.get("config")
    config = given if isinstance(given, Mapping) else {}
    found = {name: config[name] for name in _SAME if name in config}
    known = {name: record.environment[name] for name in _MACHINE if name in record.environment}
    described = (record.comparison or {}).get("data")
    data = described if isinstance(described, Mapping) else {}
    # A split that was read elsewhere is another one, and has as a rule another size.
    known |= {f"{name} of the data": data[name] for name in _DATA if name in data}
    return {name.replace("_", " "): value for name, value in {**found, **known}.items()}


def read_tuned(run: Run) -> float:
    """Read the metric that counts of a finished run of the search for learning rates.

    Args:
        run: The run; its metric is known.

    Returns:
        Its value on the validation split.

    Raises:
        DataError: If the record has neither the metric nor items.
        ArithmeticError: If the run diverged.
    """
    value = run.record.metrics.get(str(run.metric))
    if run.record.items is not None:
        items = read_items(run.record.items)
        refuse_diverged(items)
        value = metric_value(str(run.metric), items) if value is None else value
    elif str(run.metric) not in run.record.metrics:
        raise DataError(f"it holds neither {run.metric} nor items")
    if _number(value) is None:
        raise ArithmeticError(f"diverged: its {run.metric} is not finite")
    return float(value or 0.0)


def refuse_diverged(items: Items) -> None:
    """Refuse items of a model that no longer computes numbers.

    Args:
        items: The items.

    Raises:
        ArithmeticError: If any log-likelihood is not finite: what such a model predicts is the
            first class or token, whatever the input.
    """
    if items.diverged:
        raise ArithmeticError(
            f"diverged: the loss of {items.diverged} of {items.size} items is not finite"
        )


def _run_id(about: Mapping[str, Any], words: Mapping[str, str], rate: Any) -> str:
    said = about.get("run")
    if isinstance(said, str) and said:
        return said
    parts = [words[name] for name in ("phase", "task", "method", "budget")]
    return "--".join([*parts, *([f"lr{rate:g}"] if rate else []), f"seed{about['seed']}"])


def _metric(about: Mapping[str, Any], status: str) -> str | None:
    name = about.get("metric")
    if name is None and (status == "failed" or about.get("phase") == "stability"):
        return None
    if not isinstance(name, str) or name not in METRICS:
        raise DataError(f"its metric {name!r} is unknown; known: {', '.join(METRICS)}")
    if about.get("higher_is_better") is not find_metric(name).higher_is_better:
        raise DataError(f"it says of {name} the wrong direction")
    return name


def _text(about: Mapping[str, Any], name: str) -> str:
    value = about.get(name)
    if name == "budget" and is_whole(value):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"its comparison's '{name}' is {value!r}, no text")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _first(cost: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    return next((n for name in names if (n := _number(cost.get(name))) is not None), None)
