"""Run records: what a run was, what it cost and what came out, as versioned JSON.

A record is plain data, so that reports can be drawn years later without torch. It is written
whole or not at all; a record without ``status: finished`` is never taken for a finished run.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError
from gradrank.core.files import read_json, write_json
from gradrank.core.notebooks import notebook_html
from gradrank.record.checks import is_count, is_curve, is_number, shown
from gradrank.record.decisions import decision_fault
from gradrank.record.neurons import neurons_fault

SCHEMA = "gradrank.record/1"
STATUSES = ("finished", "interrupted", "failed")
_OBJECTS = ("config", "environment", "seeds", "losses", "metrics", "cost", "trainable_parameters")
_NUMBERS = ("seeds", "metrics", "cost")
_FORMS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("name", "kind", "created"), str, "text"),
    (_OBJECTS, dict, "an object"),
    (("plan", "measurement", "neurons", "comparison", "items"), dict | None, "an object or null"),
    (("ranks_over_time", "decisions"), list, "a list"),
)


@dataclass
class RunRecord:
    """One run.

    Attributes:
        name: Short label for figures (``uniform``, ``gard``).
        kind: ``plan`` (measured and allocated) or ``train``.
        status: ``finished``, ``interrupted`` or ``failed``.
        created: UTC time of the start, ISO 8601.
        config: Everything that replays the run with ``gradrank VERB --config``.
        environment: Versions, device, dtype, threads.
        seeds: ``run`` (initialisation, data order) and ``calibration`` (measuring).
        plan: The plan (schema ``gradrank.plan/1``), or None.
        measurement: Summary of the measurement: ``batches``, ``examples``, ``tokens``,
            ``estimator``, ``sketch_dim``, ``seconds``, ``peak_memory_bytes`` and per target
            ``eigenvalues`` (descending, of the M x M Gram matrix), ``effective_rank``,
            ``entropy_rank``, ``stable_rank``, ``energy`` (trace of the Gram matrix) and, if
            measured, ``singular_values`` of the mean gradient; None if nothing was measured.
        losses: ``train`` and ``eval``: lists of ``[step, loss]``, loss in nats per predicted
            item.
        ranks_over_time: List of ``[step, {target: rank}]``: the ranks at the start (step 0), then
            one entry per decision that changed something; one entry for static methods. Rank 0: the
            target has no adapter (any more). Methods that prune begin above the plan's budget.
        decisions: One entry per allocation decision during training, in order; see below.
        metrics: Final metrics by name (``eval_loss``, ``perplexity``, ``accuracy``, ...).
        cost: ``measure_seconds``, ``train_seconds``, ``eval_seconds``, ``steps``,
            ``tokens``, ``peak_memory_bytes`` and what else is known.
        trainable_parameters: ``peak`` and ``final`` of the adapter, ``other`` (a task head).
        neurons: Which output neurons a method of two stages chose, and by what; see below. None
            for other methods.
        comparison: Where the run stands in a comparison; see below. None for a run of its own.
        items: What was predicted for each item of the reported split; see below. None where nobody
            compares.

    A decision holds ``step`` and, as far as it is known:

    - Of every method: ``parameters`` (of the adapter, in use after it), ``budget`` (parameters
      allowed after it: one number for methods that move capacity, a falling curve that ends at the
      plan's budget for those that prune), ``moved`` (parameters given to targets that grew),
      ``changed`` (targets whose rank changed), ``seconds`` (allocation and surgery, and the merge
      of a measuring window; never scoring passes) and ``left_out`` (mini-batches with a NaN or
      infinite gradient so far).
    - Of methods that measure a window, per target: ``effective_rank``, ``smoothed`` (its moving
      average, which was allocated by) and ``energy`` (trace of the window's Gram matrix: mean
      squared gradient norm).
    - Of methods that prune, per target: ``importance``, the sum of the scores of the directions
      that were kept, in the method's unit; it may be negative, and a target may be missing.
    - Of methods that prune: ``passes``, the forward and backward passes that scoring alone has
      taken so far.
    - Of methods whose attributions are complete, over the looks since the last decision:
      ``attributed`` (the sum of all attributions) and ``loss_change`` (what the adapter changes
      the loss by), means in nats, and ``gap``, the completeness gap: their distance relative to the
      loss change, 0 or more.

    ``neurons`` holds

    - ``step`` (after which the rows were split), ``looks`` (at gradients, before it), ``interval``
      (steps between looks) and ``rule`` (how dominant neurons were chosen).
    - ``targets``: per target ``d_out``, ``rank`` (r, of dominant rows), ``supplementary_rank`` (r',
      of the others), ``dominant_rows``, ``dominant`` (hexadecimal: bit i stands for row i),
      ``looks`` (of this target) and ``hits`` (how many neurons were important in k looks, for k
      from 0 to ``looks``).
    - ``maps``: of a few targets ``rows`` and ``columns`` (``d_out`` and ``d_in``), ``before`` and
      ``after``: the magnitudes of the approximate gradient in the first and in the last look,
      averaged into at most 128 x 128 cells, row by row.

    ``comparison`` holds ``recipe``, ``about``, ``source`` (of the recipe), ``phase`` (``tune``,
    ``final`` or ``stability``), ``task``, ``method`` (the label), ``budget`` (as in the recipe),
    ``seed``, ``lr``, ``metric`` (the one that counts), ``higher_is_better``, ``matched`` (whether
    the arm is held to the budget), ``notes`` (texts) and ``message`` (of a failed run).

    ``items`` holds ``kind`` and lists of one length, one entry per item in the order of the split:

    - ``tokens``: ``nll`` (summed over the block, nats) and ``count`` (predicted tokens); besides,
      one text, ``digest`` (SHA-256 of the predicted tokens).
    - ``classes``: ``expected`` and ``predicted`` (class indices), ``nll`` (nats).
    - ``answers``: ``expected`` and ``predicted`` (texts; an empty one: no answer was found),
      ``nll`` and ``count`` of the reference answer, and, where a task has parts, ``group`` (texts).

    Older records lack some or all of these.
    """

    name: str
    kind: str
    status: str = "finished"
    created: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    losses: Mapping[str, list[list[float]]] = field(default_factory=dict)
    ranks_over_time: list[Any] = field(default_factory=list)
    decisions: list[Any] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    trainable_parameters: Mapping[str, int] = field(default_factory=dict)
    neurons: Mapping[str, Any] | None = None
    comparison: Mapping[str, Any] | None = None
    items: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        metrics = "".join(
            f", {key} {value:.4g}"
            for key, value in self.metrics.items()
            if isinstance(value, int | float)
        )
        return f"RunRecord({self.name}: {self.kind}, {self.status}{metrics})"

    def _repr_html_(self) -> str:
        return notebook_html("record_html", self)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data; NaN and infinity become None (JSON has neither)."""
        return {"schema": SCHEMA, **finite(asdict(self))}

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write ``record.json`` atomically.

        Args:
            path: The file.
            overwrite: Whether an existing file may be replaced.
        """
        write_json(Path(path), self.to_dict(), overwrite)

    @classmethod
    def from_dict(cls, data: Any, where: str = "record") -> "RunRecord":
        """Read a record from plain data.

        Args:
            data: What :meth:`to_dict` returns.
            where: Where it came from, for messages.

        Returns:
            The record.

        Raises:
            DataError: If the schema, a field or a field's type is wrong.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise DataError(f"{where} is no record: expected '{SCHEMA}', found {found!r}.")
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(data) - known - {"schema"})
        if unknown:
            raise DataError(f"{where} is malformed: unknown fields {unknown}.")
        if not {"name", "kind"} <= set(data):
            raise DataError(f"{where} is malformed: it lacks its name or its kind.")
        record = cls(**{key: value for key, value in data.items() if key in known})
        if record.status not in STATUSES:
            raise DataError(f"{where} has status {record.status!r}; known: {', '.join(STATUSES)}.")
        fault = _fault(record)
        if fault:
            raise DataError(f"{where}: field {fault}.")
        return record

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Read ``record.json``.

        Args:
            path: The file.

        Returns:
            The record.
        """
        return cls.from_dict(read_json(Path(path), "record"), f"'{path}'")


def _fault(record: RunRecord) -> str:
    """Say what is wrong with a field of a record that was read, or return ""."""
    for keys, kinds, what in _FORMS:
        wrong = [key for key in keys if not isinstance(getattr(record, key), kinds)]
        if wrong:
            return f"'{wrong[0]}' must be {what}"
    if not all(is_curve(curve) for curve in record.losses.values()):
        return "'losses' must hold lists of [step, loss]"
    fault = _number_fault(record)
    if fault:
        return fault
    for position, entry in enumerate(record.decisions):
        fault = decision_fault(entry)
        if fault:
            return f"'decisions', entry {position + 1}: {fault}"
    fault = neurons_fault(record.neurons) if record.neurons is not None else ""
    return f"'neurons': {fault}" if fault else ""


def _number_fault(record: RunRecord) -> str:
    for key in _NUMBERS:
        for name, value in getattr(record, key).items():
            if not is_number(value):
                return f"'{key}': '{name}' must be a finite number, and is {shown(value)}"
    for name, value in record.trainable_parameters.items():
        if value is None or not is_count(value):
            return f"'trainable_parameters': '{name}' must be a whole number, and is {shown(value)}"
    return ""


def finite(value: Any) -> Any:
    """Return plain data that JSON can hold: NaN and infinity become None, tuples become lists.

    Args:
        value: Plain data.

    Returns:
        A copy.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
