"""Tables of the study of regimes, for its page."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from benchmarks.pages import markdown
from benchmarks.regimes.measure import START
from benchmarks.regimes.readings import ENERGIES, ENTROPY, NORM, STABLE, WATERFILL, gard
from benchmarks.regimes.views import mean

Found = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
TIGHT, USUAL = "uniform:1", "uniform:8"
# The readings that are followed where all would be too many.
FEW = (gard(0.9), gard(0.5), NORM, WATERFILL)


def tables(found: Found, rows: Rows) -> dict[str, str]:
    """Return every table in Markdown, by name.

    Args:
        found: Results of the study.
        rows: From :func:`benchmarks.regimes.results.summarise`.
    """
    return {
        "cases": _cases(found),
        "readings": _readings(rows),
        "each": _each(rows),
        "batches": _batches(rows),
        "sizes": _sizes(rows),
        "points": _points(rows),
        "tasks": _tasks(rows),
        "missing": _missing(found),
    }


def pick(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """Return the rows with the given values.

    Args:
        rows: Rows.
        **wanted: Values by key.
    """
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def average(rows: Rows, key: str, budget: str | None = None) -> float | None:
    """Return the mean of a measure over rows, or None if none has it.

    Args:
        rows: Rows.
        key: The measure.
        budget: For measures by budget, which one.
    """
    return mean([row[key] if budget is None else row[key].get(budget) for row in rows])


def models_of(rows: Rows) -> list[str]:
    """Return the models of the rows, in their order.

    Args:
        rows: Rows.
    """
    return list(dict.fromkeys(row["model"] for row in rows))


def _cases(found: Found) -> str:
    head = (
        "model", "task", "point", "seeds", "mini-batches", "targets", "loss there",
        "seconds a pass",
    )  # fmt: skip
    lines = []
    for name, case in found["cases"].items():
        passes = [told for told in found["passes"].values() if told["case"] == name]
        if not passes:
            continue
        lines.append(
            (
                case["model"],
                case["task"],
                case["point"],
                str(len(passes)),
                f"{case['batches']} of {case['batch_size']}"
                + (f", at most {case['length']} tokens" if case["length"] else ""),
                str(len(found["targets"][case["model"]])),
                number(mean([told["loss"] for told in passes])),
                f"{mean([told['seconds'] for told in passes]) or 0:.0f}",
            )
        )
    return markdown(head, lines)


def _readings(rows: Rows) -> str:
    head = (
        "model", "reading", "saturation", "variation of scores", "ranks not uniform's, :1, :8",
        "moved from uniform, :1, :8", "changed by the seed, :1, :8", "split halves within shapes",
        "correlation with the gradient norm",
    )  # fmt: skip
    order = [gard(e, centred) for centred in (False, True) for e in ENERGIES]
    lines = []
    for model in models_of(rows):
        for reading in (*order, STABLE, ENTROPY, NORM, WATERFILL):
            chosen = pick(rows, model=model, reading=reading, point=START, whole=True)
            if chosen:
                lines.append(
                    (
                        model,
                        reading,
                        percent(average(chosen, "saturation")),
                        number(average(chosen, "cv")),
                        *(_both(chosen, key) for key in ("differs", "moved", "changed")),
                        number(average(chosen, "split_half_within")),
                        number(average(chosen, "with_norm")),
                    )
                )
    return markdown(head, lines)


def _each(rows: Rows) -> str:
    head = (
        "model", "task", "reading", "saturation", "variation of scores", "moved, changed",
        "seeds within shapes", "split halves within shapes", "correlation with the gradient norm",
    )  # fmt: skip
    wanted = (gard(0.9), gard(0.9, True), gard(0.5), gard(0.5, True), NORM, WATERFILL)
    start = pick(rows, point=START, whole=True)
    lines = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in start):
        for reading in wanted:
            chosen = pick(start, model=model, task=task, reading=reading)
            if chosen:
                lines.append(
                    (
                        model,
                        task,
                        reading,
                        percent(average(chosen, "saturation")),
                        number(average(chosen, "cv")),
                        _moved_changed(chosen),
                        *(
                            number(average(chosen, key))
                            for key in ("seeds_within", "split_half_within", "with_norm")
                        ),
                    )
                )
    return markdown(head, lines)


def _batches(rows: Rows) -> str:
    """Fewer mini-batches of the measured size."""
    return _views(rows, lambda row, size: row["size"] == size)


def _sizes(rows: Rows) -> str:
    """Larger mini-batches."""
    return _views(rows, lambda row, size: row["size"] != size or row["quarter"])


def _views(rows: Rows, keep: Callable[[Mapping[str, Any], int], bool]) -> str:
    head = (
        "model", "mini-batches M", "examples each", "saturation, 0.9, 0.5",
        *(f"{reading}: moved, changed" for reading in (gard(0.9), gard(0.5), NORM)),
        "seeds agree within shapes, 0.9, norm",
    )  # fmt: skip
    lines = []
    for model in models_of(rows):
        there = pick(rows, model=model, point=START)
        whole = next((row for row in there if row["whole"]), None)
        if whole is None:
            continue
        most, size = whole["batches"], whole["size"]
        seen = {(row["batches"], row["size"]) for row in there}
        for batches, each in sorted(seen, key=lambda view: (view[1], -view[0])):
            told = {"size": each, "quarter": batches == most // 4}
            if not keep(told, size):
                continue
            by = {
                reading: pick(there, batches=batches, size=each, reading=reading)
                for reading in (gard(0.9), gard(0.5), NORM)
            }
            saturations = [percent(average(by[gard(e)], "saturation")) for e in (0.9, 0.5)]
            agreed = [number(average(by[r], "seeds_within")) for r in (gard(0.9), NORM)]
            lines.append(
                (
                    model,
                    str(batches),
                    str(each),
                    ", ".join(saturations),
                    *(_moved_changed(its) for its in by.values()),
                    ", ".join(agreed),
                )
            )
    return markdown(head, lines)


def _points(rows: Rows) -> str:
    head = (
        "model, tasks", "point", "reading", "saturation", "moved, changed by the seed",
        "changed against the start", "seeds within shapes", "with the start within shapes",
    )  # fmt: skip
    lines = []
    for model in models_of(rows):
        its = pick(rows, model=model, whole=True)
        points = list(dict.fromkeys(row["point"] for row in its))
        seen = {(row["task"], row["point"]) for row in its}
        # Points are compared on the same tasks: those that were measured at all of them.
        tasks = [
            task
            for task in dict.fromkeys(row["task"] for row in its)
            if all((task, point) in seen for point in points)
        ]
        if len(points) < 2:
            continue
        for reading, point in product(FEW, points):
            found = pick(its, point=point, reading=reading)
            chosen = [row for row in found if row["task"] in tasks]
            lines.append(
                (
                    f"{model}, {', '.join(tasks)}",
                    point,
                    reading,
                    percent(average(chosen, "saturation")),
                    _moved_changed(chosen),
                    percent(average(chosen, "changed_start", USUAL)),
                    number(average(chosen, "seeds_within")),
                    number(average(chosen, "start_within")),
                )
            )
    return markdown(head, lines)


def _tasks(rows: Rows) -> str:
    head = (
        "model", "point", "reading", "within shapes: seeds", "tasks", "changed by the seed",
        "by the task and the seed", "type and depth: R², adjusted", "rest: seeds", "tasks",
    )  # fmt: skip
    lines = []
    for model in models_of(rows):
        for point in dict.fromkeys(row["point"] for row in pick(rows, model=model)):
            for reading in FEW:
                chosen = pick(rows, model=model, point=point, reading=reading, whole=True)
                if not chosen:
                    continue
                fits = [number(average(chosen, key)) for key in ("explained", "adjusted")]
                lines.append(
                    (
                        model,
                        point,
                        reading,
                        number(average(chosen, "seeds_within")),
                        number(average(chosen, "tasks_within")),
                        percent(average(chosen, "changed", USUAL)),
                        percent(average(chosen, "changed_task", USUAL)),
                        ", ".join(fits),
                        number(average(chosen, "rest_seeds")),
                        number(average(chosen, "rest_tasks")),
                    )
                )
    return markdown(head, lines)


def _missing(found: Found) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, reason in found["missing"].items():
        case, _, seed = key.rpartition(" seed ")
        reasons.setdefault((case, reason), []).append(seed)
    lines = [(case, ", ".join(seeds), reason) for (case, reason), seeds in reasons.items()] or [
        ("nothing", "-", "-")
    ]
    return markdown(("case", "seeds", "why"), lines)


def _moved_changed(chosen: Rows) -> str:
    shown = [percent(average(chosen, key, USUAL)) for key in ("moved", "changed")]
    return ", ".join(shown)


def _both(chosen: Rows, key: str) -> str:
    return ", ".join(percent(average(chosen, key, budget)) for budget in (TIGHT, USUAL))


def number(value: float | None) -> str:
    """Return a number with two decimals, or a dash.

    Args:
        value: The number.
    """
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """Return a share as a percentage, or a dash.

    Args:
        value: The share.
    """
    return "-" if value is None else f"{100 * value:.0f} %"
