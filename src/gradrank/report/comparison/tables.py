"""The tables of a comparison: every cell, each task by budget, pooled, stability."""

from collections.abc import Sequence

from gradrank.evidence.comparison import Pooled, Stability
from gradrank.report.comparison.blocks import Entry, Filter, Grid, Line
from gradrank.report.comparison.view import MARKS, Row, View, in_order, label
from gradrank.report.text import (
    NOTHING,
    as_float,
    count,
    memory,
    percent,
    seconds,
    signed,
)

_ORDER = ("better", "no evidence", "worse", "not tested", "reference")
UNMATCHED = "unmatched"
_TO = "\u2009–\u2009"


def num(text: str, sort: float | None = None, small: str = "", flag: str = "") -> Entry:
    """Return a numeric entry.

    Args:
        text: What is shown.
        sort: The number behind it.
        small: A second line.
        flag: A badge.

    Returns:
        The entry.
    """
    return Entry(text, sort, numeric=True, small=small, flag=flag)


def p_text(p: float | None) -> str:
    """Return a p value.

    Args:
        p: The value, or None.

    Returns:
        Three decimals; smaller ones as ``<0.001``.

    Examples:
        >>> p_text(0.0421), p_text(0.00002), p_text(None)
        ('0.042', '<0.001', '–')
    """
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def evidence(verdict: str) -> Entry:
    """Return a verdict with its mark.

    Args:
        verdict: The verdict.

    Returns:
        The entry.
    """
    tone = verdict if verdict in {"better", "worse"} else ""
    place = float(_ORDER.index(verdict)) if verdict in _ORDER else None
    return Entry(f"{MARKS.get(verdict, '')} {verdict}", place, tone=tone)


def main_table(view: View) -> Grid | None:
    """Return every cell of the comparison.

    Args:
        view: The comparison.

    Returns:
        The table, or None without a cell.
    """
    if not view.rows:
        return None
    tasks, budgets, methods = view.tasks, view.budgets, view.methods
    head = [
        Entry("method"),
        Entry("task"),
        Entry("budget"),
        num("mean (95 % interval)"),
        num("sd"),
        num("seeds"),
        num(f"against {label(view.reference, 24)} (+ is better)"),
        num("p, corrected"),
        Entry("evidence"),
        num("parameters, peak"),
        num("parameters, final"),
        num("learning rate"),
        num("calibration"),
        num("training"),
        num("peak memory"),
    ]
    lines = [
        Line(
            _cells(view, row, budgets),
            (tasks.index(row.task), budgets.index(row.budget), methods.index(row.method)),
        )
        for row in view.rows
    ]
    filters = [
        Filter("task", [label(task) for task in tasks]),
        Filter("budget", [label(budget) for budget in budgets]),
        Filter("method", [label(method) for method in methods]),
    ]
    return Grid("all", "One row per method, task and budget.", head, lines, filters)


def _cells(view: View, row: Row, budgets: Sequence[str]) -> list[Entry]:
    rate = as_float(row.cell.lr)
    peak, final = row.largest("peak"), row.largest("final")
    calibration, training = row.average("calibration_seconds"), row.average("train_seconds")
    held = row.largest("peak_memory_bytes")
    flag = "" if row.cell.matched else UNMATCHED
    return [
        Entry(label(row.method), label(row.method), flag=flag),
        Entry(label(row.task), label(row.task)),
        Entry(label(row.budget), float(budgets.index(row.budget))),
        _mean(view, row),
        num(view.value(row.task, row.sd), row.sd),
        _seeds(row),
        _difference(view, row),
        num(p_text(row.p), row.p),
        evidence(row.verdict),
        num(count(peak), peak),
        num(count(final), final),
        num(NOTHING if rate is None else f"{rate:g}", rate),
        num(seconds(calibration), calibration),
        num(seconds(training), training),
        num(memory(held), held),
    ]


def _mean(view: View, row: Row) -> Entry:
    ends = row.interval
    small = f"{view.value(row.task, ends[0])}{_TO}{view.value(row.task, ends[1])}" if ends else ""
    return num(view.value(row.task, row.mean), row.mean, small)


def _difference(view: View, row: Row) -> Entry:
    if row.difference is None:
        return num(NOTHING)
    ends = row.difference_interval
    small = f"{view.change(row.task, ends[0])}{_TO}{view.change(row.task, ends[1])}" if ends else ""
    return num(view.change(row.task, row.difference), row.difference, small)


def _seeds(row: Row) -> Entry:
    done = len(row.outcomes)
    lost = [f"{row.cell.failed} failed"] if row.cell.failed else []
    lost += [f"{len(row.cell.missing)} missing"] if row.cell.missing else []
    text = f"⚠ {done} of {row.planned}" if lost else str(done)
    return num(text, done, ", ".join(lost))


def task_table(view: View, task: str, position: int) -> Grid:
    """Return one task: methods down, budgets across.

    Args:
        view: The comparison.
        task: The task.
        position: Its place among the tasks.

    Returns:
        The table.
    """
    rows = {(row.method, row.budget): row for row in view.of(task)}
    budgets = [budget for budget in view.budgets if any(b == budget for _, b in rows)]
    methods = [method for method in view.methods if any(m == method for m, _ in rows)]
    sizes = {info.text: info.parameters for info in view.source.budgets}
    head = [Entry("method")]
    for budget in budgets:
        size = as_float(sizes.get(budget, {}).get(task))
        small = f" ({count(size)} parameters)" if size is not None else ""
        head.append(num(f"{label(budget, 40)}{small}"))
    lines = []
    for method in methods:
        own = [rows.get((method, budget)) for budget in budgets]
        flag = UNMATCHED if method in view.unmatched else ""
        first = Entry(label(method), label(method), flag=flag)
        lines.append(Line([first, *(_marked(view, row) for row in own)]))
    caption = f"{view.metric(task)}, mean over seeds with its 95 % interval, by budget."
    return Grid(f"task-{position}", caption, head, lines)


def _marked(view: View, row: Row | None) -> Entry:
    if row is None or row.mean is None:
        lost = row.cell.failed if row is not None else 0
        return num(NOTHING, flag=f"{lost} failed" if lost else "")
    plain = _mean(view, row)
    tone = row.verdict if row.verdict in {"better", "worse"} else ""
    text = f"{plain.text} {MARKS.get(row.verdict, '')}"
    return Entry(text, row.mean, numeric=True, small=plain.small, tone=tone)


def pooled_table(view: View) -> Grid | None:
    """Return the differences over all tasks: methods down, budgets across.

    Args:
        view: The comparison.

    Returns:
        The table, or None where nothing was pooled.
    """
    found = {(each.method, each.budget): each for each in view.source.pooled}
    if not found:
        return None
    known = [info.text for info in view.source.budgets]
    budgets = in_order((budget for _, budget in found), known)
    head = [Entry("method"), *(num(label(budget, 40)) for budget in budgets)]
    lines = []
    for method in in_order((method for method, _ in found), view.source.methods):
        flag = UNMATCHED if method in view.unmatched else ""
        first = Entry(label(method), label(method), flag=flag)
        lines.append(Line([first, *(_pooled(found.get((method, b))) for b in budgets)]))
    caption = (
        f"Difference to {label(view.reference)} over all tasks by budget, in standard deviations "
        "over seeds; positive is better. Below it: 95 % interval and corrected p."
    )
    return Grid("pooled-table", caption, head, lines)


def _pooled(each: Pooled | None) -> Entry:
    difference = as_float(each.difference) if each else None
    if each is None or difference is None:
        return num(NOTHING)
    low, high, p = (as_float(v) for v in (each.low, each.high, each.p_corrected))
    small = ""
    if low is not None and high is not None:
        small = f"{signed(low, 2)}{_TO}{signed(high, 2)}, p {p_text(p)}"
    tone = each.verdict if each.verdict in {"better", "worse"} else ""
    text = f"{signed(difference, 2)} {MARKS.get(each.verdict, '')}"
    return Entry(text, difference, numeric=True, small=small, tone=tone)


def stability_table(view: View) -> Grid | None:
    """Return how far plans of different calibration seeds agree.

    Args:
        view: The comparison.

    Returns:
        The table, or None without such plans.
    """
    if not view.source.stability:
        return None
    head = [
        Entry("method"),
        Entry("task"),
        Entry("budget"),
        num("pairs of plans"),
        num("rank correlation (least and most alike pair)"),
        num("parameters in common"),
    ]
    budgets = {info.text: float(i) for i, info in enumerate(view.source.budgets)}
    lines = [Line(_agreement(each, budgets.get(each.budget))) for each in view.source.stability]
    caption = "Plans of one method that differ in the seed of the calibration data alone."
    return Grid("stability-table", caption, head, lines)


def _agreement(each: Stability, place: float | None) -> list[Entry]:
    middle, low, high = (as_float(v) for v in (each.mean, each.low, each.high))
    small = ""
    if low is not None and high is not None:
        small = f"{signed(low, 2)}{_TO}{signed(high, 2)}"
    share = as_float(each.share)
    return [
        Entry(label(each.method), label(each.method)),
        Entry(label(each.task), label(each.task)),
        Entry(label(each.budget), place),
        num(count(each.pairs), each.pairs),
        num(
            "one rank everywhere" if middle is None else signed(middle, 2),
            middle,
            small,
        ),
        num(percent(share), share),
    ]
