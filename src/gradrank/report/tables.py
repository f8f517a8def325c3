"""Tables: results, cost, and every target."""

from collections.abc import Callable, Sequence

from gradrank.report.blocks import Cell, Table, num
from gradrank.report.layout import Layout
from gradrank.report.text import NOTHING, count, memory, number, percent, seconds, signed
from gradrank.report.verdict import baseline_for
from gradrank.report.view import Measurement, Run

_Column = tuple[Cell, Callable[[Run], Cell | None]]
_KNOWN_METRICS = ("eval_loss", "perplexity")


def results_table(runs: Sequence[Run]) -> Table:
    """Return the results, one row per run; columns that no run fills are left out.

    Args:
        runs: The runs.

    Returns:
        The table.
    """
    others = dict.fromkeys(m for run in runs for m in run.metrics if m not in _KNOWN_METRICS)
    columns: list[_Column] = [
        (num("held‑out loss"), lambda run: _number(run.final_loss, f"{run.final_loss or 0:.4f}")),
        (num("against uniform"), lambda run: _against(run, runs)),
        (num("perplexity"), lambda run: _metric(run, "perplexity")),
        *((num(name), _metric_column(name)) for name in list(others)[:4]),
        (num("adapter parameters"), lambda run: _number(run.parameters, count(run.parameters))),
        (num("most in use"), lambda run: _peak(run, runs)),
        (num("slack"), lambda run: _number(run.slack, count(run.slack).replace("-", "−"))),
        (num("targets used"), _targets_used),
        (num("ranks"), _rank_range),
        (num("steps"), lambda run: _number(run.steps, count(run.steps))),
        (num("time"), lambda run: _number(run.total_seconds, seconds(run.total_seconds))),
        (num("peak memory"), lambda run: _memory(run, "peak_memory_bytes")),
    ]
    return _table("results", "Results, one row per run.", runs, columns)


def cost_table(runs: Sequence[Run]) -> Table | None:
    """Return what measuring cost beside training.

    Args:
        runs: The runs.

    Returns:
        The table, or None if no cost is known.
    """
    if not any(run.cost or _passes(run) for run in runs):
        return None
    columns: list[_Column] = [
        (num("measuring"), lambda run: _seconds(run, "measure_seconds")),
        (num("training"), lambda run: _seconds(run, "train_seconds")),
        (num("evaluating"), lambda run: _seconds(run, "eval_seconds")),
        (num("whole run"), lambda run: _number(run.total_seconds, seconds(run.total_seconds))),
        (num("measuring, share of the run"), _measuring_share),
        (num("per step"), _per_step),
        (num("scoring passes"), _passes),
        (num("scoring passes per step"), _passes_per_step),
        (num("tokens"), lambda run: _count(run, "tokens")),
        (num("peak memory, measuring"), lambda run: _memory(run, "measure_peak_memory_bytes")),
        (num("peak memory, whole run"), lambda run: _memory(run, "peak_memory_bytes")),
    ]
    return _table("cost-table", "Cost of each run.", runs, columns)


def target_table(
    runs: Sequence[Run], measurements: Sequence[Measurement], layout: Layout
) -> Table | None:
    """Return every target with its shape, ranks, effective rank and scores.

    Args:
        runs: The runs.
        measurements: The distinct measurements.
        layout: Gives layers and module types.

    Returns:
        The table, or None without targets.
    """
    planned = [run for run in runs if run.planned]
    scored = [run for run in planned if any(p.score is not None for p in run.planned.values())]
    ranked = [m for m in measurements if any(_effective(m, name) for name in layout.places)]
    if not layout.places:
        return None
    head = [Cell("target"), num("layer"), Cell("type"), num("out × in")]
    for run in planned:
        if run.history is not None:
            head += [num(f"rank at the start, {run.label}"), num(f"final rank, {run.label}")]
        else:
            head.append(num(f"rank, {run.label}"))
    several = len(ranked) > 1
    head += [num(f"effective rank{', ' + m.runs[0] if several else ''}") for m in ranked]
    head += [num(f"score, {run.label}") for run in scored]
    rows = []
    for name, (column, _) in layout.places.items():
        depth = layout.columns[column][1]
        row = [Cell(name, name), num(NOTHING if depth is None else str(depth), depth)]
        row += [Cell(layout.row_of(name), layout.row_of(name)), _shape(planned, name)]
        for run in planned:
            entry = run.planned.get(name)
            if run.history is not None:
                first = run.history.start.get(name, 0) if entry and run.history.ranks else None
                row.append(num(count(first), first))
            row.append(num(count(entry.rank), entry.rank) if entry else num(NOTHING))
        for measured in ranked:
            value = _effective(measured, name)
            row.append(num(count(value), value))
        for run in scored:
            entry = run.planned.get(name)
            score = entry.score if entry else None
            row.append(num(number(score), score))
        rows.append(row)
    return Table("targets", f"All {count(len(rows))} targets", head, rows, interactive=True)


def _table(name: str, caption: str, runs: Sequence[Run], columns: Sequence[_Column]) -> Table:
    filled = []
    for head, value in columns:
        cells = [value(run) for run in runs]
        if any(cell is not None for cell in cells):
            filled.append((head, cells))
    rows = [
        [_run_cell(run), *(cells[i] or num(NOTHING) for _, cells in filled)]
        for i, run in enumerate(runs)
    ]
    return Table(name, caption, [Cell("run"), *(head for head, _ in filled)], rows)


def _run_cell(run: Run) -> Cell:
    method = "" if run.method in run.label else f" ({run.method})"
    return Cell(run.label + method, run.label, flag="" if run.finished else run.status)


def _number(value: float | None, text: str) -> Cell | None:
    return None if value is None else num(text, value)


def _metric(run: Run, name: str) -> Cell | None:
    return _number(run.metrics.get(name), number(run.metrics.get(name)))


def _metric_column(name: str) -> Callable[[Run], Cell | None]:
    return lambda run: _metric(run, name)


def _seconds(run: Run, key: str) -> Cell | None:
    return _number(run.cost.get(key), seconds(run.cost.get(key)))


def _memory(run: Run, key: str) -> Cell | None:
    return _number(run.cost.get(key), memory(run.cost.get(key)))


def _count(run: Run, key: str) -> Cell | None:
    return _number(run.cost.get(key), count(run.cost.get(key)))


def _against(run: Run, runs: Sequence[Run]) -> Cell | None:
    base = baseline_for(run, runs)
    if base is None or base.final_loss is None or run.final_loss is None or not run.finished:
        return None
    difference = run.final_loss - base.final_loss
    return num(signed(difference), difference)


def _targets_used(run: Run) -> Cell | None:
    if not run.planned:
        return None
    used = sum(1 for entry in run.planned.values() if entry.rank)
    return num(f"{count(used)} of {count(len(run.planned))}", used)


def _rank_range(run: Run) -> Cell | None:
    used = [entry.rank for entry in run.planned.values() if entry.rank]
    if not used:
        return None
    low, high = min(used), max(used)
    return num(str(low) if low == high else f"{low}–{high}", high)


def _measuring_share(run: Run) -> Cell | None:
    spent, whole = run.cost.get("measure_seconds"), run.total_seconds
    if spent is None or not whole or "train_seconds" not in run.cost:
        return None
    return num(percent(spent / whole), spent / whole)


def _per_step(run: Run) -> Cell | None:
    spent, steps = run.cost.get("train_seconds"), run.steps
    return num(seconds(spent / steps), spent / steps) if spent is not None and steps else None


def _peak(run: Run, runs: Sequence[Run]) -> Cell | None:
    """The most parameters in use, for all runs as soon as one ends with fewer."""
    if not any((r.peak or 0) > (r.parameters or r.peak or 0) for r in runs):
        return None
    return _number(run.peak, count(run.peak))


def _passes(run: Run) -> Cell | None:
    passes = run.history.passes if run.history else None
    return _number(passes, count(passes))


def _passes_per_step(run: Run) -> Cell | None:
    passes = run.history.passes if run.history else None
    if passes is None or not run.steps:
        return None
    return num(number(passes / run.steps, 3), passes / run.steps)


def _effective(measured: Measurement, name: str) -> int | None:
    found = measured.targets.get(name)
    return found.effective_rank if found else None


def _shape(runs: Sequence[Run], name: str) -> Cell:
    for run in runs:
        entry = run.planned.get(name)
        if entry and entry.d_in and entry.d_out:
            return num(f"{entry.d_out} × {entry.d_in}", entry.d_in * entry.d_out)
    return num(NOTHING)
