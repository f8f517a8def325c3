"""The section on how capacity moved: one block per run whose ranks have a history."""

from collections.abc import Callable, Mapping, Sequence

from gradrank.report.blocks import Block, Cell, Gallery, Paragraph, Section, Table, num
from gradrank.report.figures_courses import effective_courses, rank_courses
from gradrank.report.figures_moves import budget_course, moved_bars
from gradrank.report.figures_time import energy_map, rank_map
from gradrank.report.history import Event
from gradrank.report.layout import Layout
from gradrank.report.movement import contradictions, headline
from gradrank.report.text import NOTHING, count, number, percent, plural, seconds
from gradrank.report.view import Run

# A longer table of decisions starts folded.
SHORT = 12


def history_section(runs: Sequence[Run], layout: Layout) -> Section:
    """Draw the histories of all runs that have one.

    Args:
        runs: The runs.
        layout: Where each target stands.

    Returns:
        The section; without blocks if no run has a history.
    """
    blocks: list[Block] = []
    dynamic = [run for run in runs if run.history is not None]
    for i, run in enumerate(dynamic):
        blocks += _history(run, layout, f"-{i + 1}" if i else "", len(runs) > 1)
    return Section("history", "How capacity moved", blocks)


def _history(run: Run, layout: Layout, suffix: str, named: bool) -> list[Block]:
    lead = f"{run.label}{'' if run.finished else f' ({run.status})'}." if named else ""
    blocks: list[Block] = [Paragraph(headline(run, layout) + _cost(run), "note", lead)]
    odd = contradictions(run.history) if run.history else ""
    if odd:
        blocks.append(Paragraph(odd, "warn"))
    drawn = (
        rank_map(run, layout, suffix),
        energy_map(run, layout, suffix),
        rank_courses(run, layout, suffix),
        budget_course(run, suffix),
        moved_bars(run, suffix),
        effective_courses(run, layout, suffix),
    )
    figures = [figure for figure in drawn if figure is not None]
    if figures:
        blocks.append(Gallery(figures))
    table = decision_table(run, suffix)
    return [*blocks, table] if table else blocks


def decision_table(run: Run, suffix: str = "") -> Table | None:
    """Return every decision with what it measured, moved and cost.

    Args:
        run: The run.
        suffix: Ends the table's name when a page shows several histories.

    Returns:
        The table, folded if it is long; None without decisions. Columns that no decision fills
        are left out.
    """
    history = run.history
    if history is None or not history.events:
        return None
    columns: list[tuple[str, Callable[[Event], Cell | None]]] = [
        ("step", lambda e: num(count(e.step), e.step)),
        ("parameters in use", lambda e: _whole(e.parameters)),
        ("budget", lambda e: _whole(e.budget)),
        ("left over", _slack),
        ("parameters moved", lambda e: _whole(e.moved)),
        ("share of the budget", _share),
        ("targets changed", lambda e: _whole(e.changed)),
        ("mean effective rank", lambda e: _mean(e.decision.effective_rank)),
        ("mean energy", lambda e: _mean(e.decision.energy)),
        ("time", lambda e: _seconds(e.decision.seconds)),
    ]
    filled = []
    for head, value in columns:
        cells = [value(event) for event in history.events]
        if any(cell is not None for cell in cells):
            filled.append((head, cells))
    rows = [[cells[i] or num(NOTHING) for _, cells in filled] for i in range(len(history.events))]
    whose = "" if not suffix else f" of {run.label}"
    caption = f"{_title(run, len(rows))}{whose}"
    folded = len(rows) > SHORT
    heads = [num(head) for head, _ in filled]
    return Table(f"decisions{suffix}", caption, heads, rows, folded, hint="step or number")


def _title(run: Run, rows: int) -> str:
    told = run.history is not None and run.history.decisions
    return f"All {plural(rows, 'decision' if told else 'change')}" if rows > 1 else "One decision"


def _cost(run: Run) -> str:
    """Say what all decisions took, and which share of training that is."""
    spent = [e.decision.seconds for e in (run.history.events if run.history else ())]
    known = [each for each in spent if each is not None]
    if not known:
        return ""
    whole = run.cost.get("train_seconds")
    share = f", {percent(sum(known) / whole)} of training time" if whole else ""
    return f" Measuring, deciding and resizing took {seconds(sum(known))} in all{share}."


def _whole(value: int | None) -> Cell | None:
    return None if value is None else num(count(value), value)


def _slack(event: Event) -> Cell | None:
    if event.parameters is None or event.budget is None:
        return None
    left = event.budget - event.parameters
    flag = "over budget" if left < 0 else ""
    return Cell(count(left).replace("-", "−"), left, numeric=True, flag=flag)


def _share(event: Event) -> Cell | None:
    if event.moved is None or not event.budget:
        return None
    return num(percent(event.moved / event.budget), event.moved / event.budget)


def _mean(values: Mapping[str, float]) -> Cell | None:
    mean = sum(values.values()) / len(values) if values else None
    return None if mean is None else num(number(mean, 3), mean)


def _seconds(value: float | None) -> Cell | None:
    return None if value is None else num(seconds(value), value)
