"""Records read with care for a report: fields may be missing, wrong or hostile."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradrank.core.errors import DataError
from gradrank.core.partition import NeuronPartition
from gradrank.record import RunRecord
from gradrank.report.history import History
from gradrank.report.history_reading import read_history
from gradrank.report.neurons import read_neurons, read_partition
from gradrank.report.text import as_count, as_float, clean, shorten
from gradrank.report.view import Measured, Measurement, Planned, Run

DEFAULT_ALPHA = 0.9


def read_runs(records: Sequence[RunRecord]) -> list[Run]:
    """Read records into the form that figures and tables draw from.

    Args:
        records: The records, in the order in which they shall appear.

    Returns:
        One run per record, with distinct labels.

    Raises:
        DataError: If there is no record.
    """
    if not records:
        raise DataError("there is no record to report on. Give at least one record.json.")
    runs = [_read_run(record) for record in records]
    return [
        replace(
            run,
            label=label,
            measurement=replace(run.measurement, runs=(label,)) if run.measurement else None,
        )
        for run, label in zip(runs, _labels(runs), strict=True)
    ]


def distinct_measurements(runs: Sequence[Run]) -> list[Measurement]:
    """Return each measurement once; methods that share one also share its figures.

    Two measurements are the same when their spectra are; what only one of them holds (the
    singular values, the energy threshold) is taken over.

    Args:
        runs: The runs.

    Returns:
        The measurements, in order of appearance, each naming its runs.
    """
    found: dict[Any, Measurement] = {}
    for run in runs:
        if run.measurement is None:
            continue
        values = {
            name: m.eigenvalues or m.singular_values for name, m in run.measurement.targets.items()
        }
        key = tuple(sorted(values.items()))
        found[key] = _merge(found[key], run.measurement) if key in found else run.measurement
    return list(found.values())


def _merge(mine: Measurement, other: Measurement) -> Measurement:
    targets = {}
    for name, m in mine.targets.items():
        o = other.targets[name]
        targets[name] = replace(
            m,
            singular_values=m.singular_values or o.singular_values,
            effective_rank=o.effective_rank if m.effective_rank is None else m.effective_rank,
            energy=o.energy if m.energy is None else m.energy,
        )
    return replace(
        mine,
        targets=targets,
        facts={**other.facts, **mine.facts},
        alpha=mine.alpha if mine.alpha is not None else other.alpha,
        runs=mine.runs + other.runs,
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    names = [run.label for run in runs]
    seeded = [
        f"{run.label} (seed {run.seed})"
        if names.count(run.label) > 1 and run.seed is not None
        else run.label
        for run in runs
    ]
    result: list[str] = []
    for label in seeded:
        unique, again = label, 1
        while unique in result:
            again += 1
            unique = f"{label} #{again}"
        result.append(unique)
    return result


def _read_run(record: RunRecord) -> Run:
    plan = _mapping(record.plan)
    method = plan.get("method")
    options = _mapping(_mapping(method).get("options"))
    name = _mapping(method).get("name") or (method if isinstance(method, str) else record.name)
    losses = _mapping(record.losses)
    reliability = plan.get("reliability")
    planned = _read_planned(plan)
    budget = as_count(_mapping(plan.get("budget")).get("parameters"))
    costs = {key: entry.d_in + entry.d_out for key, entry in planned.items() if entry.shaped}
    history = read_history(record, costs, budget, as_float(options.get("tolerance")))
    neurons, splits = read_neurons(record)
    if splits and history is not None and len(history.events) <= 1:
        # One split is no history of ranks: priced by ranks alone, parameters would be wrong.
        history = None
    return Run(
        label=shorten(clean(record.name), 32) or "unnamed",
        method=clean(name, 60),
        kind=clean(record.kind, 20),
        status=clean(record.status, 20),
        seed=as_count(_mapping(record.seeds).get("run")),
        record=record,
        planned=_with_splits(_with_final_ranks(planned, history), splits),
        budget=budget,
        provenance=_mapping(plan.get("provenance")),
        reliability=reliability if isinstance(reliability, Mapping) else None,
        measurement=_read_measurement(record, as_float(options.get("energy"))),
        train=_curve(losses.get("train")),
        evals=_curve(losses.get("eval")),
        metrics=_numbers(record.metrics),
        cost=_numbers(record.cost),
        history=history,
        neurons=neurons,
    )


def _read_planned(plan: Mapping[str, Any]) -> dict[str, Planned]:
    result = {}
    for name, entry in _mapping(plan.get("targets")).items():
        row = _mapping(entry)
        rank, d_in, d_out = (as_count(row.get(key)) for key in ("rank", "d_in", "d_out"))
        if rank is not None:
            score = as_float(row.get("score"))
            split = read_partition(row["partition"]) if "partition" in row else None
            fits = split is not None and (split.d_out, split.lora_rank) == (d_out, rank)
            kept = split if fits else None
            result[clean(name)] = Planned(rank, d_in or 0, d_out or 0, score, kept)
    return result


def _with_splits(
    planned: Mapping[str, Planned], splits: Mapping[str, NeuronPartition]
) -> Mapping[str, Planned]:
    """Return what targets have after their rows were split; one that contradicts its shape is not.

    A target that the plan does not name has rows, but no known input.
    """
    result = dict(planned)
    for name, split in splits.items():
        entry = planned.get(name, Planned(0, 0, 0, None))
        if entry.d_out in {0, split.d_out}:
            result[name] = replace(entry, rank=split.lora_rank, split=split)
    return result


def _with_final_ranks(
    planned: Mapping[str, Planned], history: History | None
) -> Mapping[str, Planned]:
    """Return the ranks at the end of a run; a target that its history left out has rank 0."""
    if history is None or not history.ranks:
        return planned
    result = {}
    for name in dict.fromkeys([*planned, *history.targets]):
        entry, rank = planned.get(name, Planned(0, 0, 0, None)), history.final.get(name, 0)
        split = entry.split if entry.split and entry.split.lora_rank == rank else None
        result[name] = replace(entry, rank=rank, split=split)
    return result


def _read_measurement(record: RunRecord, alpha: float | None) -> Measurement | None:
    data = _mapping(record.measurement)
    targets = {
        clean(name): Measured(
            eigenvalues=_values(_mapping(entry).get("eigenvalues")),
            singular_values=_values(_mapping(entry).get("singular_values")),
            effective_rank=as_count(_mapping(entry).get("effective_rank")),
            entropy_rank=as_float(_mapping(entry).get("entropy_rank")),
            stable_rank=as_float(_mapping(entry).get("stable_rank")),
            energy=as_float(_mapping(entry).get("energy")),
        )
        for name, entry in _mapping(data.get("targets")).items()
    }
    if not targets:
        return None
    facts = _numbers({key: value for key, value in data.items() if key != "targets"})
    return Measurement(
        targets=targets,
        facts=facts,
        estimator=clean(data.get("estimator") or "", 60),
        alpha=alpha if alpha is not None and 0 < alpha <= 1 else _default_alpha(targets),
    )


def _default_alpha(targets: Mapping[str, Measured]) -> float | None:
    """Return GARD's default threshold if it explains every effective rank, else None."""
    known = [m for m in targets.values() if m.eigenvalues and m.effective_rank is not None]
    for m in known:
        shares = np.cumsum(m.eigenvalues) / (sum(m.eigenvalues) or 1.0)
        if m.effective_rank != int(np.sum(shares < DEFAULT_ALPHA - 1e-12)) + (shares[-1] > 0):
            return None
    return DEFAULT_ALPHA if known else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _numbers(value: Any) -> dict[str, float]:
    read = {clean(key, 60): as_float(item) for key, item in _mapping(value).items()}
    return {key: item for key, item in read.items() if item is not None}


def _values(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        return ()
    read = [as_float(item) for item in value]
    # One bad entry spoils the spectrum: a shorter one would be a different, plausible spectrum.
    return tuple(max(v, 0.0) for v in read if v is not None) if None not in read else ()


def _curve(value: Any) -> tuple[tuple[float, float], ...]:
    points = []
    for point in value if isinstance(value, list | tuple) else []:
        if isinstance(point, list | tuple) and len(point) == 2:
            step, loss = as_float(point[0]), as_float(point[1])
            if step is not None and loss is not None:
                points.append((step, loss))
    return tuple(points)
